"""What kind of corpus a path names: text, JSONL, CSV or Parquet, by the endings of its files.

- A file, or a glob, is of the kind of its ending, in any case; a file of an unknown ending that is named by
  itself is text.
- A directory is of the one kind of its files. Beside rows (Parquet, JSONL, CSV), texts that describe a data
  set by their names (`README.md`, `LICENSE.txt`) do not count, nor do `.json` files beside Parquet or CSV.
  Other mixtures are refused: which of the files to read, only the user can know.

Files of other endings are passed over. `Listing.describe` says what is.
"""

import re
from collections import Counter

from distft.data.corpus_listing import counted, ending_of, find_entries
from distft.errors import ConfigError, DataError

SUFFIXES: dict[str, tuple[str, ...]] = {
    "text": (".txt", ".text", ".md", ".rst"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
}
_DESCRIPTION = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing|authors|security|code_of_conduct"
    r"|dataset_?card|datasheet|requirements)(?![a-z])",
    re.IGNORECASE,
)
_KIND_OF = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}


def kind_of_corpus(paths: list[str]) -> str:
    """The kind of the files that `paths` name. Raises `ConfigError` if there are several, or none."""
    kinds: Counter[str] = Counter()
    problems = []
    for path in paths:
        try:
            found = _kinds(path)
        except DataError as error:
            problems.append(str(error))
            continue
        if isinstance(found, str):
            problems.append(found)
        else:
            kinds += found
    if problems:
        raise ConfigError("\n".join(problems))
    if len(kinds) > 1:
        raise ConfigError(
            f"CORPUS mixes {' and '.join(sorted(kinds))} files ({counted(kinds)}): name files of one kind, "
            "such as 'DIRECTORY/**/*.jsonl', or a .yaml file that describes a mixture (type: mixture, "
            "sources: [{corpus: {...}, weight: 1}])."
        )
    return next(iter(kinds))


def _kinds(path: str) -> Counter[str] | str:
    """How many files of each kind one path names, or why that cannot be said."""
    named = find_entries(path)
    if not named.entries:
        return Counter([_KIND_OF.get(ending_of(path), "text")])  # listing the files says what is wrong
    counting = [entry for entry in named.entries if not entry.not_counted] or named.entries
    endings = Counter(ending_of(entry.file.url) for entry in counting)
    kinds: Counter[str] = Counter()
    for ending, number in endings.items():
        kind = _KIND_OF.get(ending, "text" if named.takes_any else "")
        if kind:
            kinds[kind] += number
    if not kinds:
        return (
            f"corpus path {path} has no file of a known ending "
            f"({', '.join(_KIND_OF)}, or one of these with .gz or .zst); it has {counted(endings)}. "
            "To read files as text, name them, or a glob with their ending."
        )
    if named.is_directory:
        names = [entry.file.url.rpartition("/")[2] for entry in counting]
        num_descriptions = sum(bool(_DESCRIPTION.match(name)) for name in names if _is_text(name))
        return _without_descriptions(kinds, endings, num_descriptions)
    return kinds


def _is_text(name: str) -> bool:
    return _KIND_OF.get(ending_of(name)) == "text"


def _without_descriptions(kinds: Counter[str], endings: Counter[str], num_descriptions: int) -> Counter[str]:
    rows = kinds.keys() - {"text"}
    if not rows:
        return kinds
    if rows - {"jsonl"} and not endings.keys() & {".jsonl", ".ndjson"}:
        rows -= {"jsonl"}  # `.json` beside Parquet or CSV
    counted_rows = Counter({kind: kinds[kind] for kind in rows})
    return counted_rows + Counter({"text": kinds["text"] - num_descriptions})
