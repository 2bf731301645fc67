"""Losses that TRL computes on a few rows, for tests/objective/test_trl.py, and the rows and weights.

TRL has an environment of its own, which needs no distft:

    python -m venv build/trl && build/trl/bin/pip install -c constraints.txt trl
    build/trl/bin/python tools/trl_losses.py tests/golden/trl

Losses are those of the first steps on all rows, in fp32 on the CPU. The same versions write the same files,
but for how another CPU rounds.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-not-found]
import torch
import transformers
import trl  # type: ignore[import-not-found]
from trl.experimental import orpo  # type: ignore[import-not-found]

_TEMPLATE = """\
{%- for message in messages %}{{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content ~ '<|im_end|>\\n' }}{% endgeneration %}
    {%- else %}{{- message.content ~ '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
_WORDS = ("a", "bird", "cat", "dog", "moon", "ran", "red", "river", "sang", "sat", "saw", "stone", "under")
_MERGES = [("Ġ", "r"), ("Ġ", "s"), ("a", "n"), ("o", "n"), ("Ġr", "e"), ("Ġs", "a"), ("o", "g"), ("d", "og")]
_NUM_ROWS, _PEAK_LR, _BETA, _SFT_WEIGHT = 6, 3e-3, 0.25, 0.5
_TRAINING: dict[str, Any] = {
    **{"max_steps": 4, "per_device_train_batch_size": _NUM_ROWS, "use_cpu": True, "bf16": False},
    **{"learning_rate": _PEAK_LR, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0},
    **{"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8},  # distft's defaults
    **{"gradient_checkpointing": False, "save_strategy": "no", "report_to": "none"},
}


def make_rows() -> dict[str, list[dict[str, Any]]]:
    """Rows of many lengths, by the name of their file; every third conversation has two answers."""
    draw = random.Random(4)

    def words(most: int) -> str:
        return " ".join(draw.choice(_WORDS) for _ in range(draw.randrange(1, most + 1)))

    def says(role: str) -> dict[str, str]:
        return {"role": role, "content": words(4)}

    completions, chats, pairs, chat_pairs = [], [], [], []
    for number in range(_NUM_ROWS):
        completions.append({"prompt": words(5), "completion": f" {words(5)}"})
        before = [says(role) for role in ("system", "user", "assistant")] if number % 3 == 0 else []
        chats.append({"messages": [*before, says("user"), says("assistant")]})
        texts = {"chosen": f"{words(5)} red", "rejected": f"{words(4)} moon"}
        pairs.append({"prompt": words(5)} | {name: f" {text}" for name, text in texts.items()})
        answers = {name: [{"role": "assistant", "content": text}] for name, text in texts.items()}
        chat_pairs.append({"prompt": [*before, says("user")], **answers})
    return {"completions": completions, "chats": chats, "pairs": pairs, "chat_pairs": chat_pairs}


def make_tokenizer(path: Path) -> Any:
    """Byte-level BPE of the letters that occur and a few merges, with the template's marks; writes `path`."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    letters = sorted({*"".join(_WORDS), *"systemuserassistant", "Ġ", "Ċ"})  # a space and a line's end
    vocab = {text: number for number, text in enumerate([*special, *letters, *map("".join, _MERGES)])}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    library = {
        "version": "1.0",
        "added_tokens": [{"id": vocab[text], "content": text, "special": True, **flags} for text in special],
        "pre_tokenizer": bytes_of,
        "decoder": bytes_of,
        "model": {"type": "BPE", "vocab": vocab, "merges": _MERGES},
    }
    path.write_text(json.dumps(library), encoding="utf-8")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path), eos_token=special[0], pad_token=special[3], chat_template=_TEMPLATE
    )


def make_model(tokenizer: Any, seed: int) -> Any:
    """A random Llama, with weights so large that its losses differ from token to token."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 192}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes, **ids)
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config)


def losses_of(method: str, folder: Path, rows: str, **settings: Any) -> list[float]:
    """Of each step of a training by `method` (SFT, DPO, ORPO) on all rows of the file `rows`.jsonl."""
    load, module = transformers.AutoModelForCausalLM.from_pretrained, orpo if method == "ORPO" else trl
    lines = (folder / f"{rows}.jsonl").read_text(encoding="utf-8").splitlines()
    found: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        trainer = getattr(module, f"{method}Trainer")(
            model=load(folder / "model"),
            args=getattr(module, f"{method}Config")(output_dir=scratch, **_TRAINING, **settings),
            train_dataset=datasets.Dataset.from_list(list(map(json.loads, lines))),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder / "model"),
            **({"ref_model": load(folder / "reference")} if method == "DPO" else {}),
        )
        step = trainer.training_step

        def recorded(*arguments: Any, **options: Any) -> Any:
            loss = step(*arguments, **options)
            found.append(float(loss))  # TRL's own log has four digits
            return loss

        trainer.training_step = recorded
        trainer.train()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Write losses that TRL computes, with rows and weights.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    (folder / "model").mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder / "model" / "tokenizer.json")
    tokenizer.save_pretrained(folder / "model")
    for seed, name in enumerate(("model", "reference")):
        make_model(tokenizer, seed).save_pretrained(folder / name)
    for name, rows in make_rows().items():
        text = "\n".join(map(json.dumps, rows)) + "\n"
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    versions = {module.__name__: module.__version__ for module in (trl, transformers, torch)}
    both = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, _SFT_WEIGHT]}
    losses = {
        "completions": losses_of("SFT", folder, "completions"),
        "chats": losses_of("SFT", folder, "chats", assistant_only_loss=True),
        "dpo": losses_of("DPO", folder, "pairs", beta=_BETA),
        "dpo_chats": losses_of("DPO", folder, "chat_pairs", beta=_BETA),
        "dpo_sft": losses_of("DPO", folder, "pairs", beta=_BETA, **both),
        "ipo": losses_of("DPO", folder, "pairs", beta=_BETA, loss_type="ipo"),
        "orpo": losses_of("ORPO", folder, "pairs", beta=_BETA),
    }
    settings = {"beta": _BETA, "sft_weight": _SFT_WEIGHT, "peak_lr": _PEAK_LR}
    written = json.dumps({"versions": versions, "settings": settings, "losses": losses}, indent=1)
    (folder / "losses.json").write_text(written + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
