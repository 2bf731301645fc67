"""What a classifier's export needs beside transformers' own files: an id for padding, and its own head."""

import json
from math import prod

from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.rank_file import bytes_of
from distft.checkpoint.safetensors_header import safetensors_header
from distft.checkpoint.sources import CheckpointSource

CLASSIFIER = "classifier.weight"
HEAD_FILE = "classifier.safetensors"
README_FILE = "classifier.md"

_POOLING = {
    "last": "hidden[torch.arange(len(hidden)), mask.sum(1) - 1]",
    "mean": "(hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)",
    "first": "hidden[:, 0]",
}
_README = """# A classifier of distft

transformers has no model with this head, so its weights lie beside the model, in `{head_file}`.
This applies it:

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

folder = "."  # this directory
labels = {labels}
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
head = load_file(f"{{folder}}/{head_file}")["{name}"]

texts = ["a text", "another one"]
with torch.no_grad():
    rows = tokenizer(texts, padding=True, return_tensors="pt")
    hidden, mask = model(**rows).last_hidden_state, rows["attention_mask"]
    pooled = {pooling}
    logits = pooled.to(head.dtype) @ head.T
print([labels[i] for i in logits.argmax(1)])
```
"""


def head_files(source: CheckpointSource, pooling: str, label_names: list[str]) -> dict[str, bytes]:
    """The files of a head that transformers cannot hold: its weights, and how to apply them."""
    record = source.manifest.parameters[CLASSIFIER]
    values = source.read(CLASSIFIER, WEIGHT, 0, prod(record.shape))
    header = safetensors_header([(CLASSIFIER, values.dtype, record.shape)])
    readme = _README.format(
        head_file=HEAD_FILE,
        name=CLASSIFIER,
        labels=json.dumps(label_names, ensure_ascii=False),
        pooling=_POOLING[pooling],
    )
    return {
        HEAD_FILE: header + bytes_of(values),
        README_FILE: readme.encode(),
    }
