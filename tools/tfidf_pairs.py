"""What TF-IDF finds without training a model: recall of pairs, or rank correlation with scores.

`python tools/tfidf_pairs.py TRAIN TEST [--positive COLUMN] [--text COLUMN] [--score COLUMN]`

Fits the inverse document frequencies on the texts of TRAIN alone, compares the pairs of TEST by cosine, and
prints the metrics of `objective.type=contrastive` for three kinds of terms.
"""

import argparse
import re
from collections.abc import Callable, Sequence

import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from distft.data.records import read_records
from distft.objective.retrieval import retrieval_metrics, spearman

TERMS: dict[str, Callable[[], TfidfVectorizer]] = {
    "words": lambda: TfidfVectorizer(sublinear_tf=True),
    "words, identifiers split": lambda: TfidfVectorizer(
        sublinear_tf=True, lowercase=False, token_pattern=None, tokenizer=_words_of_identifiers
    ),
    "characters, 3 to 5": lambda: TfidfVectorizer(
        sublinear_tf=True, analyzer="char_wb", ngram_range=(3, 5), min_df=2
    ),
}


def _words_of_identifiers(text: str) -> list[str]:
    """`find_executable` and `findExecutable` are two words each."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", text)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("train", help="The file of the training pairs.")
    parser.add_argument("test", help="The file of the test pairs.")
    parser.add_argument("--text", default="text", help="The column of the first text.")
    parser.add_argument("--positive", default="positive", help="The column of the second text.")
    parser.add_argument("--score", help="The column of the scores; without one the pairs belong together.")
    options = parser.parse_args(arguments)
    columns = [options.text, options.positive]
    train = read_records(options.train, texts=columns)
    test = read_records(options.test, texts=columns, numbers=[options.score] if options.score else [])
    for name, make in TERMS.items():
        vectorizer = make().fit([record.values[column] for record in train for column in columns])
        one, other = (
            torch.from_numpy(vectorizer.transform([r.values[column] for r in test]).toarray())
            for column in columns
        )
        if options.score:
            scores = torch.tensor([float(record.values[options.score]) for record in test])
            metrics = {"spearman": spearman((one * other).sum(dim=1), scores)}
        else:
            hashes = torch.tensor([[hash(record.values[column]) for column in columns] for record in test])
            metrics = retrieval_metrics(torch.stack([one, other], dim=1), hashes)
        print(f"{name}: {', '.join(f'{key} {value:.4f}' for key, value in metrics.items())}")


if __name__ == "__main__":
    main()
