"""Preferences from labelled texts: a text's own label as the better answer, another one as the worse.

    python tools/preference_pairs.py data/trec/train.jsonl data/trec_preferences/train.jsonl

The worse answer of each text is drawn from the labels that other texts have. Equal input gives equal output.
"""

import argparse
import json
import random
from pathlib import Path

_TEMPLATE = "Question: {text}\nThe answer is a kind of:"


def write(source: Path, target: Path) -> int:
    """Write a pair for each row with `text` and `label`; returns their number."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    labels, draw = sorted({row["label"] for row in rows}), random.Random(1)
    if len(labels) < 2:
        raise SystemExit(
            f"{source} has {len(labels)} labels, and a worse answer needs another one: name other rows."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8") as file:
        for row in rows:
            worse = draw.choice([label for label in labels if label != row["label"]])
            pair = {
                "prompt": _TEMPLATE.format(text=row["text"]),
                "chosen": f" {row['label']}",
                "rejected": f" {worse}",
            }
            file.write(json.dumps(pair) + "\n")
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="JSONL with the columns text and label")
    parser.add_argument("target", type=Path, help="JSONL with the columns prompt, chosen and rejected")
    arguments = parser.parse_args()
    print(f"{write(arguments.source, arguments.target):,} pairs in {arguments.target}")


if __name__ == "__main__":
    main()
