"""Baseline for text classification: TF-IDF of words and n-grams, logistic regression. Needs scikit-learn.

python tools/tfidf_floor.py data/trec/train.jsonl data/trec/test.jsonl
python tools/tfidf_floor.py data/trec/train.jsonl data/trec/test.jsonl --trials 16  # a search
python tools/tfidf_floor.py data/trec/train.jsonl data/trec/test.jsonl --label fine_label \
  --label-separator : --threshold 0.3  # several labels a row, a regression for each

A search draws settings at random, chooses by accuracy on folds of the training rows, and reads the test rows
once, for the best settings.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from random import Random
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MultiLabelBinarizer

from distft.data.records import read_records
from distft.errors import DistftError
from distft.search.space import ChoiceConfig, LogUniformConfig, Space, Values, random_point

DEFAULT: Values = {"c": 30.0, "ngrams": 2, "sublinear_tf": True, "min_df": 1, "lowercase": True}
SPACE: Space = {  # five settings
    "c": LogUniformConfig(low=0.1, high=300.0),
    "ngrams": ChoiceConfig(values=[1, 2, 3]),
    "sublinear_tf": ChoiceConfig(values=[True, False]),
    "min_df": ChoiceConfig(values=[1, 2, 3]),
    "lowercase": ChoiceConfig(values=[True, False]),
}


def main(raw: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Accuracy and macro-F1 of TF-IDF and logistic regression.")
    parser.add_argument("train", help="JSONL or CSV")
    parser.add_argument("test", help="JSONL or CSV")
    parser.add_argument("--text", default="text", help="column")
    parser.add_argument("--label", default="label", help="column")
    parser.add_argument("--trials", type=int, default=0, help="search over so many settings first")
    parser.add_argument(
        "--folds", type=int, default=5, help="of the training rows, by which a search chooses"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    parser.add_argument("--label-separator", help="between the labels of a row that has several")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="with it: the least probability of a label"
    )
    arguments = parser.parse_args(raw)
    if arguments.trials and arguments.label_separator is not None:
        parser.error("--trials searches for settings of one label a row: leave --label-separator out")
    try:
        train_texts, train_labels = _columns(arguments.train, arguments.text, arguments.label)
        test_texts, test_labels = _columns(arguments.test, arguments.text, arguments.label)
    except DistftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if arguments.label_separator is not None:
        train_sets, test_sets = (
            [label.split(arguments.label_separator) for label in labels]
            for labels in (train_labels, test_labels)
        )
        figures = _of_several(train_texts, train_sets, test_texts, test_sets, arguments.threshold)
        print(json.dumps({"num_train": len(train_texts), "num_test": len(test_texts), **figures}))
        return 0
    values, found = DEFAULT, dict[str, Any]()
    if arguments.trials:
        values, found = _search(
            train_texts, train_labels, arguments.trials, num_folds=arguments.folds, seed=arguments.seed
        )
    model = _model(values)
    model.fit(train_texts, train_labels)
    predictions = model.predict(test_texts)
    figures = {
        "num_train": len(train_texts),
        "num_test": len(test_texts),
        "num_labels": len(set(train_labels)),
        **found,
        "accuracy": round(float(accuracy_score(test_labels, predictions)), 4),
        "macro_f1": round(float(f1_score(test_labels, predictions, average="macro")), 4),
    }
    print(json.dumps(figures))
    return 0


def _of_several(
    train_texts: Sequence[str],
    train_sets: Sequence[Sequence[str]],
    test_texts: Sequence[str],
    test_sets: Sequence[Sequence[str]],
    threshold: float,
) -> dict[str, Any]:
    """Figures of a logistic regression for each label that occurs in training."""
    labels = MultiLabelBinarizer().fit([*train_sets, *test_sets])
    model = _model(DEFAULT, several=True)
    num_known = len({label for labels_of_row in train_sets for label in labels_of_row})
    train_labels, test_labels = labels.transform(train_sets), labels.transform(test_sets)
    predictions = model.fit(train_texts, train_labels).predict_proba(test_texts) >= threshold
    return {
        "num_labels": num_known,
        "exact_match": round(float(accuracy_score(test_labels, predictions)), 4),
        "micro_f1": round(float(f1_score(test_labels, predictions, average="micro")), 4),
    }


def _model(values: Values, *, several: bool = False) -> Any:
    classifier = LogisticRegression(C=values["c"], max_iter=1000)
    return make_pipeline(
        TfidfVectorizer(
            ngram_range=(1, values["ngrams"]),
            sublinear_tf=values["sublinear_tf"],
            min_df=values["min_df"],
            lowercase=values["lowercase"],
            token_pattern=r"\w+|[^\w\s]",
        ),
        OneVsRestClassifier(classifier) if several else classifier,
    )


def _search(
    texts: list[str], labels: list[str], num_trials: int, *, num_folds: int, seed: int
) -> tuple[Values, dict[str, Any]]:
    """The settings with the best mean accuracy over folds, and what to tell of them."""
    shuffle_seed = Random(seed).randrange(1 << 31)
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=shuffle_seed)
    trials = []
    for number in range(num_trials):
        values = random_point(SPACE, seed, number)
        scores = cross_val_score(_model(values), texts, labels, cv=folds, scoring="accuracy")
        trials.append((float(scores.mean()), -number, values))
    mean, _, best = max(trials, key=lambda trial: trial[:2])
    default = cross_val_score(_model(DEFAULT), texts, labels, cv=folds, scoring="accuracy")
    return best, {
        "num_trials": num_trials,
        "best": {key: round(one, 4) if isinstance(one, float) else one for key, one in best.items()},
        "folds_accuracy": round(mean, 4),
        "folds_accuracy_of_default": round(float(default.mean()), 4),
    }


def _columns(path: str, text: str, label: str) -> tuple[list[str], list[str]]:
    records = read_records(path, texts=[text], labels=[label])
    return [record.values[text] for record in records], [record.values[label] for record in records]


if __name__ == "__main__":
    sys.exit(main())
