"""Statements of Python's standard library with the role of each name, a task of labels for words.

`python tools/name_roles.py data/name_roles` writes train.jsonl and test.jsonl (tokens, labels, text). Labels
are BIO: what is defined (DEF), a parameter (PARAM), a keyword argument (KEYWORD), what is called (CALL) or
imported (IMPORT), dotted names as a whole; else O. They come from the syntax tree, so they are right.
"""

import ast
import hashlib
import io
import json
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

_FEWEST, _MOST = 4, 40  # tokens of a statement
_TEST_SHARE = 10  # one of so many
_MOST_TRAIN = 12_000
_WORDS = {tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING}
_LONGEST = 24  # characters of a token: longer strings are cut

Place = tuple[int, int]  # line and column


def roles_in(tree: ast.AST) -> Iterator[tuple[Place, Place, str]]:
    """Where each named thing begins and ends, and its role; of a definition where the statement begins."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield (node.lineno, node.col_offset), (node.lineno, node.col_offset + len(node.arg)), "PARAM"
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield (node.lineno, node.col_offset), (node.lineno, node.col_offset + len(node.arg)), "KEYWORD"
        elif isinstance(node, ast.Call) and _is_dotted(node.func):
            func = node.func
            assert func.end_lineno is not None
            assert func.end_col_offset is not None
            yield (func.lineno, func.col_offset), (func.end_lineno, func.end_col_offset), "CALL"
        elif isinstance(node, ast.alias):
            assert node.end_col_offset is not None
            end = node.col_offset + len(node.name)
            yield (node.lineno, node.col_offset), (node.lineno, end), "IMPORT"


def _is_dotted(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and _is_dotted(node.value))


def statements(source: str) -> Iterator[tuple[list[str], list[str]]]:
    """The words and labels of each logical line."""
    roles = {start: (stop, role) for start, stop, role in roles_in(ast.parse(source))}
    words: list[str] = []
    labels: list[str] = []
    inside: tuple[Place, str] | None = None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE:
            yield words, labels
            words, labels, inside = [], [], None
        if token.type not in _WORDS:
            continue
        if inside is not None and token.start >= inside[0]:
            inside = None
        label = "O" if inside is None else f"I-{inside[1]}"
        if words and words[-1] in {"def", "class"} and token.type == tokenize.NAME:
            label = "B-DEF"
        elif inside is None and token.start in roles and token.type == tokenize.NAME:
            inside = roles[token.start]
            label = f"B-{inside[1]}"
        words.append(token.string[:_LONGEST])
        labels.append(label)


def library_statements() -> Iterator[dict[str, object]]:
    """Of the modules at the top of the running Python's library, without those that are not ASCII."""
    seen: set[str] = set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_bytes()
        if not source.isascii():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in old strings
            for words, labels in statements(source.decode()):
                text = " ".join(words)
                if _FEWEST <= len(words) <= _MOST and text not in seen and set(labels) != {"O"}:
                    seen.add(text)
                    yield {"tokens": words, "labels": labels, "text": text}


def main(folder: Path) -> None:
    train: list[tuple[int, dict[str, object]]] = []
    test: list[tuple[int, dict[str, object]]] = []
    for row in library_statements():
        digest = int.from_bytes(hashlib.blake2b(str(row["text"]).encode(), digest_size=8).digest())
        (train if digest % _TEST_SHARE else test).append((digest, row))
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows, most in (("train", train, _MOST_TRAIN), ("test", test, _MOST_TRAIN // _TEST_SHARE)):
        chosen = [row for _, row in sorted(rows, key=lambda pair: pair[0])[:most]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        print(f"{folder / name}.jsonl: {len(chosen):,} of {len(rows):,} statements")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
