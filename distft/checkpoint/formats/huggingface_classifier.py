"""What a classifier's export needs beside transformers' own files: an id for padding, and its own head."""

import json
from math import prod

from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.rank_file import bytes_of
from distft.checkpoint.safetensors_header import safetensors_header
from distft.checkpoint.sources import CheckpointSource
from distft.model.heads import CLASSIFIER_NORM_EPS

CLASSIFIER = "classifier.weight"
CLASSIFIER_HIDDEN, CLASSIFIER_OUTPUT = "classifier.hidden", "classifier.output"  # of one with a layer
_CLASSIFIER_NORM = "classifier.norm"
HEAD_FILE = "classifier.safetensors"
README_FILE = "classifier.md"

_POOLING = {
    "last": "hidden[torch.arange(len(hidden)), mask.sum(1) - 1]",
    "mean": "(hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)",
    "first": "hidden[:, 0]",
    "max": "hidden.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)",
}
_LOGITS = "pooled @ head['{name}'].T"
_OUTPUT = " @ head['{output}.weight'].T + head['{output}.bias']"
_LOGITS_WITH_LAYER = (
    "torch.{activation}(pooled @ head['{hidden}.weight'].T + head['{hidden}.bias'])" + _OUTPUT
)
_LOGITS_WITH_NORM = (
    "torch.nn.functional.layer_norm(torch.nn.functional.gelu(pooled @ head['{hidden}.weight'].T),"
    " pooled.shape[1:], head['{norm}.weight'], eps={eps})" + _OUTPUT
)
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
head = load_file(f"{{folder}}/{head_file}")

texts = ["a text", "another one"]
with torch.no_grad():
    rows = tokenizer(texts, padding=True, return_tensors="pt")
    hidden, mask = model(**rows).last_hidden_state, rows["attention_mask"]
    pooled = {pooling}
    pooled = pooled.to(next(iter(head.values())).dtype)
    logits = {logits}
print([labels[i] for i in logits.argmax(1)])
```
"""


def head_files(
    source: CheckpointSource, pooling: str, hidden: str, label_names: list[str]
) -> dict[str, bytes]:
    """The files of a head that transformers cannot hold: its weights, and how to apply them.

    `pooling` and `hidden` are the objective's.
    """
    parts = [
        f"{part}.{kind}" for part in (CLASSIFIER_HIDDEN, CLASSIFIER_OUTPUT) for kind in ("weight", "bias")
    ]
    if hidden == "gelu_norm":
        parts = [f"{CLASSIFIER_HIDDEN}.weight", f"{_CLASSIFIER_NORM}.weight", *parts[2:]]
    names = [CLASSIFIER] if hidden == "none" else parts
    logits = {"none": _LOGITS, "gelu_norm": _LOGITS_WITH_NORM}.get(hidden, _LOGITS_WITH_LAYER)
    shapes = {name: source.manifest.parameters[name].shape for name in names}
    values = {name: source.read(name, WEIGHT, 0, prod(shape)) for name, shape in shapes.items()}
    header = safetensors_header([(name, values[name].dtype, shapes[name]) for name in names])
    readme = _README.format(
        head_file=HEAD_FILE,
        labels=json.dumps(label_names, ensure_ascii=False),
        pooling=_POOLING[pooling],
        logits=logits.format(
            name=CLASSIFIER,
            activation=hidden,
            hidden=CLASSIFIER_HIDDEN,
            norm=_CLASSIFIER_NORM,
            output=CLASSIFIER_OUTPUT,
            eps=CLASSIFIER_NORM_EPS,
        ),
    )
    return {
        HEAD_FILE: header + b"".join(bytes_of(values[name]) for name in names),
        README_FILE: readme.encode(),
    }
