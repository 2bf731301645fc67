"""Pairs of English number words and digits, a small translation task, and how many of a model's are right.

    python tools/number_words.py write data/numbers
    distft generate runs/translation --prompts data/numbers/test.jsonl --temperature 0 --json > numbers.jsonl
    python tools/number_words.py score numbers.jsonl

No number of the test is in the training data. The smallest are: their words are needed to read the others.
"""

import argparse
import json
import random
from pathlib import Path

_SMALL = (  # noqa: SIM905
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
_MOST, _NUM_SMALLEST = 1_000_000, 100


def words(number: int) -> str:
    """`number` below a million in British English: 900012 is nine hundred thousand and twelve."""
    if number < 20:
        return _SMALL[number]
    if number < 100:
        tens = _TENS[number // 10 - 2]
        return f"{tens} {_SMALL[number % 10]}" if number % 10 else tens
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    head, rest = f"{words(number // unit)} {name}", number % unit
    if not rest:
        return head
    return f"{head} and {words(rest)}" if rest < 100 else f"{head} {words(rest)}"


def write(folder: Path, num_train: int, num_test: int) -> None:
    """Two files of prompts and completions."""
    source = random.Random(1)
    # As many digits are as likely as few: of all numbers nine in ten have six.
    drawn: dict[int, None] = {}
    while len(drawn) < num_train + num_test:
        most = 10 ** source.randrange(3, 7)
        drawn[source.randrange(_NUM_SMALLEST, min(most, _MOST))] = None
    numbers = list(drawn)
    source.shuffle(numbers)
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"test": numbers[:num_test], "train": [*range(_NUM_SMALLEST), *numbers[num_test:]]}
    for name, own in splits.items():
        lines = [json.dumps({"prompt": words(number), "completion": str(number)}) for number in own]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def score(path: Path) -> tuple[int, int]:
    """How many texts of `distft generate --json` are the digits of their prompts, and how many there are."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    answers = [row["text"].removeprefix(row["prompt"]).strip() for row in rows]
    is_right = [
        answer.isdecimal() and int(answer) < _MOST and words(int(answer)) == row["prompt"]
        for answer, row in zip(answers, rows, strict=True)
    ]
    return sum(is_right), len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    writing = verbs.add_parser("write", help="write train.jsonl and test.jsonl")
    writing.add_argument("folder", type=Path)
    writing.add_argument("--train", type=int, default=20_000)
    writing.add_argument("--test", type=int, default=500)
    scoring = verbs.add_parser("score", help="count the right answers of `distft generate --json`")
    scoring.add_argument("file", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "write":
        write(arguments.folder, arguments.train, arguments.test)
        return
    num_right, num_rows = score(arguments.file)
    print(f"{num_right} of {num_rows} exactly right: {num_right / max(num_rows, 1):.1%}")


if __name__ == "__main__":
    main()
