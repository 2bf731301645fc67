"""Baseline for text classification: TF-IDF of words and bigrams, logistic regression. Needs scikit-learn.

python tools/tfidf_floor.py data/trec/train.jsonl data/trec/test.jsonl
"""

import argparse
import json
import sys

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline

from distft.data.records import read_records
from distft.errors import DistftError


def main() -> int:
    parser = argparse.ArgumentParser(description="Accuracy and macro-F1 of TF-IDF and logistic regression.")
    parser.add_argument("train", help="JSONL or CSV")
    parser.add_argument("test", help="JSONL or CSV")
    parser.add_argument("--text", default="text", help="column")
    parser.add_argument("--label", default="label", help="column")
    arguments = parser.parse_args()
    try:
        train_texts, train_labels = _columns(arguments.train, arguments.text, arguments.label)
        test_texts, test_labels = _columns(arguments.test, arguments.text, arguments.label)
    except DistftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+|[^\w\s]"),
        LogisticRegression(C=30.0, max_iter=1000),
    )
    model.fit(train_texts, train_labels)
    predictions = model.predict(test_texts)
    figures = {
        "num_train": len(train_texts),
        "num_test": len(test_texts),
        "num_labels": len(set(train_labels)),
        "accuracy": round(float(accuracy_score(test_labels, predictions)), 4),
        "macro_f1": round(float(f1_score(test_labels, predictions, average="macro")), 4),
    }
    print(json.dumps(figures))
    return 0


def _columns(path: str, text: str, label: str) -> tuple[list[str], list[str]]:
    records = read_records(path, texts=[text], labels=[label])
    return [record.values[text] for record in records], [record.values[label] for record in records]


if __name__ == "__main__":
    sys.exit(main())
