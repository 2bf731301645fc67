"""Labels of words: the loss against transformers, metrics against seqeval and scikit-learn."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.huggingface_models import MAX_SEQ_LEN, VOCAB_SIZE, make_distft_model, randomize
from support.tiny_models import SIZES, build, build_any
from torch import Tensor

from distft.checkpoint.formats.huggingface_source import HuggingFaceCheckpoint
from distft.checkpoint.sources import read_state
from distft.collectives import SingleProcess
from distft.data.batch import Batch
from distft.data.targets import IGNORE_INDEX, TOKEN_LABEL
from distft.errors import ConfigError
from distft.model.encoder_decoder_config import EncoderDecoderConfig
from distft.model.heads import TokenHead
from distft.model.older_configs import RecurrentConfig
from distft.model.transformer_config import TransformerConfig
from distft.objective.entities import entity_types, precision_recall_f1, spans_of
from distft.objective.interface import ObjectiveContext
from distft.objective.token_classification import TokenClassification

CONTEXT = ObjectiveContext(61, SingleProcess())
NAMES = ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")
OBJECTIVE = TokenClassification(labels=NAMES)
LABELS = st.sampled_from(["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("LOC", "PER"))])
SENTENCES = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)), min_size=1, max_size=7)


def batch_of(num_rows: int = 5, width: int = 9, num_labels: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, num_labels, (num_rows, width), generator=generator)
    lengths = torch.randint(3, width + 1, (num_rows,), generator=generator)
    is_other = torch.rand(num_rows, width, generator=generator) < 0.4  # further tokens of a word
    labels[is_other | (torch.arange(width) >= lengths[:, None])] = IGNORE_INDEX
    return Batch(
        input_ids=torch.randint(0, 53, (num_rows, width), generator=generator),
        targets={TOKEN_LABEL: labels},
        num_targets={TOKEN_LABEL: int((labels != IGNORE_INDEX).sum())},
        lengths=lengths,
    )


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_the_loss_and_its_gradient_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_SEQ_LEN,
        "num_labels": 5,
    }
    sizes |= (
        {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
        if kind == "bert"
        else {"dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 37}
    )
    config = transformers.AutoConfig.for_model(kind, **sizes)
    oracle = transformers.AutoModelForTokenClassification.from_config(config)
    randomize(oracle)
    oracle.eval().classifier.bias.data.zero_()
    oracle.base_model.save_pretrained(tmp_path)
    source = HuggingFaceCheckpoint.open(str(tmp_path))
    own = TransformerConfig.model_validate(source.manifest.config["model"])
    model = make_distft_model(own, {"token_classifier": TokenHead(num_outputs=5)})
    for name, param in model.named_parameters():
        if not name.startswith("token_classifier"):
            read_state(source, name, "weight", param.detach().view(-1), 0)
    head = model.get_submodule("token_classifier")
    head.weight.data.copy_(oracle.classifier.weight.data)  # type: ignore[operator, union-attr]
    batch = batch_of()
    loss = OBJECTIVE.loss_sums(model, batch, CONTEXT)[TOKEN_LABEL] / OBJECTIVE.num_targets(batch)[TOKEN_LABEL]
    loss.backward()
    is_real = (torch.arange(9) < batch.lengths[:, None]).long()
    expected = oracle(batch.input_ids, attention_mask=is_real, labels=batch.targets[TOKEN_LABEL]).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(head.weight.grad, oracle.classifier.weight.grad, rtol=0, atol=1e-6)
    embedded = oracle.base_model.get_input_embeddings().weight.grad
    torch.testing.assert_close(model.embed.weight.grad[:VOCAB_SIZE], embedded, rtol=0, atol=1e-6)


@given(st.lists(LABELS, max_size=9))
@settings(max_examples=300, deadline=None)
def test_spans_are_those_of_seqeval(labels: list[str]) -> None:
    from seqeval.metrics.sequence_labeling import get_entities

    found = [(span.type, span.start, span.stop - 1) for span in spans_of(labels)]
    assert found == (get_entities(labels) if labels else [])


def model_that_says(predicted: Tensor) -> Any:
    logits = torch.nn.functional.one_hot(predicted.clamp_min(0), len(NAMES)).float() * 9
    return lambda **_: {"token_classifier": logits}


@given(st.lists(SENTENCES, min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_metrics_are_those_of_seqeval_and_scikit_learn(sentences: list[list[tuple[str, str]]]) -> None:
    import warnings

    from seqeval import metrics as oracle
    from sklearn.metrics import accuracy_score, f1_score

    width = max(len(sentence) for sentence in sentences) + 2
    real, predicted = (torch.full((len(sentences), width), IGNORE_INDEX) for _ in range(2))
    for row, sentence in enumerate(sentences):
        for place, pair in enumerate(sentence, start=1):  # [CLS] is before the words
            real[row, place], predicted[row, place] = (NAMES.index(label) for label in pair)
    batch = Batch(
        input_ids=torch.zeros(real.shape, dtype=torch.int64),
        targets={TOKEN_LABEL: real},
        num_targets={TOKEN_LABEL: int((real != IGNORE_INDEX).sum())},
    )
    found = OBJECTIVE.metrics(OBJECTIVE.evaluate(model_that_says(predicted), batch, CONTEXT))
    truth = [[label for label, _ in sentence] for sentence in sentences]
    guess = [[label for _, label in sentence] for sentence in sentences]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of undefined precision and recall, which are 0
        assert found["entity_f1"] == pytest.approx(float(oracle.f1_score(truth, guess)))
        assert found["entity_precision"] == pytest.approx(float(oracle.precision_score(truth, guess)))
        assert found["entity_recall"] == pytest.approx(float(oracle.recall_score(truth, guess)))
    flat = [[label for sentence in labels for label in sentence] for labels in (truth, guess)]
    assert found["accuracy"] == pytest.approx(accuracy_score(*flat))
    assert found["macro_f1"] == pytest.approx(f1_score(*flat, average="macro", zero_division=np.nan))


def test_documents_of_a_packed_row_have_entities_of_their_own() -> None:
    """Their losses and metrics are those of a row each."""
    model = build(TransformerConfig(**SIZES, attention="bidirectional"), OBJECTIVE.heads(NAMES))
    ids = torch.randint(0, 53, (2, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 3, 1, 3], [3, 3, 4, IGNORE_INDEX]])
    apart = Batch(input_ids=ids, targets={TOKEN_LABEL: labels}, num_targets={TOKEN_LABEL: 7})
    packed = Batch(
        input_ids=ids.view(1, 8),
        targets={TOKEN_LABEL: labels.view(1, 8)},
        num_targets={TOKEN_LABEL: 7},
        document_ids=torch.arange(8)[None] // 4,
        position_ids=torch.arange(8)[None] % 4,
    )
    for name, value in OBJECTIVE.evaluate(model, apart, CONTEXT).items():
        torch.testing.assert_close(OBJECTIVE.evaluate(model, packed, CONTEXT)[name], value)
    losses = [OBJECTIVE.loss_sums(model, batch, CONTEXT)[TOKEN_LABEL] for batch in (apart, packed)]
    torch.testing.assert_close(*losses)
    real = OBJECTIVE.evaluate(model_that_says(labels.view(1, 8)), packed, CONTEXT)["entities"]
    assert real.tolist() == [[0, 3], [0, 3], [0, 3]]  # I-PER after I-PER in another document begins anew


def test_sums_do_not_depend_on_how_a_batch_is_cut() -> None:
    model = build(TransformerConfig(**SIZES), OBJECTIVE.heads(NAMES))
    batch = batch_of()
    cuts = [
        replace(
            batch,
            input_ids=batch.input_ids[rows],
            lengths=batch.lengths[rows],
            targets={TOKEN_LABEL: batch.targets[TOKEN_LABEL][rows]},
        )
        for rows in (slice(0, 2), slice(2, 5))
    ]
    for name, whole in OBJECTIVE.evaluate(model, batch, CONTEXT).items():
        parts = [OBJECTIVE.evaluate(model, cut, CONTEXT)[name] for cut in cuts]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)


def test_a_recurrent_model_labels_words_too() -> None:
    config = RecurrentConfig(
        type="lstm", vocab_size=61, max_seq_len=24, d_model=8, num_layers=1, direction="bidirectional"
    )
    model = build_any(config.model_copy(update={"tie_embeddings": False}), OBJECTIVE.heads(NAMES))
    batch = batch_of()
    loss = OBJECTIVE.loss_sums(model, batch, CONTEXT)[TOKEN_LABEL]
    assert loss.isfinite()
    short = replace(
        batch,
        input_ids=batch.input_ids[:1, : int(batch.lengths[0])],
        lengths=None,
        targets={TOKEN_LABEL: batch.targets[TOKEN_LABEL][:1, : int(batch.lengths[0])]},
    )
    padded = replace(
        batch,
        input_ids=batch.input_ids[:1],
        lengths=batch.lengths[:1],
        targets={TOKEN_LABEL: batch.targets[TOKEN_LABEL][:1]},
    )
    alone, among = (OBJECTIVE.loss_sums(model, own, CONTEXT)[TOKEN_LABEL] for own in (short, padded))
    torch.testing.assert_close(alone, among)


def test_labels_that_mark_no_entities_have_figures_by_label() -> None:
    objective = TokenClassification(labels=("NOUN", "VERB"))
    assert entity_types(("NOUN", "VERB")) == entity_types(("B-", "O")) == entity_types(("X-PER", "O")) == []
    labels = torch.tensor([[0, 1, 1]])
    batch = Batch(
        input_ids=torch.zeros(1, 3, dtype=torch.int64),
        targets={TOKEN_LABEL: labels},
        num_targets={TOKEN_LABEL: 3},
    )
    model = lambda **_: {"token_classifier": torch.tensor([[[1.0, 0], [1.0, 0], [0, 1.0]]])}  # noqa: E731
    sums = objective.evaluate(model, batch, CONTEXT)
    assert set(objective.metrics(sums)) == {"loss", "accuracy", "macro_f1"}
    lines = objective.report(sums, ("NOUN", "VERB"))
    assert lines[0] == "2 of 3 words are right; 95 % interval of the accuracy (Wilson): 0.2077 to 0.9385"
    assert lines[2].split()[-1] == "words"
    assert [line.replace(" to ", "-").split() for line in lines[3:]] == [
        ["NOUN", "0.5000", "0.0945-0.9055", "1.0000", "0.2065-1.0000", "0.6667", "1"],
        ["VERB", "1.0000", "0.2065-1.0000", "0.5000", "0.0945-0.9055", "0.6667", "2"],
    ]
    assert objective.predictions([0, 1], None) == {"labels": ["NOUN", "VERB"]}
    assert precision_recall_f1(0, 0, 0) == (0.0, 0.0, 0.0)


def test_predictions_name_the_spans_of_words() -> None:
    found = OBJECTIVE.predictions([4, 0, 2, 1], None)
    assert found["labels"] == ["O", "B-LOC", "I-LOC", "B-PER"]
    assert found["spans"] == [
        {"type": "LOC", "start": 1, "stop": 3},
        {"type": "PER", "start": 3, "stop": 4},
    ]


def test_data_without_labels_of_words_and_other_labels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"set data\.type=token_labels"):
        OBJECTIVE.heads(None)
    with pytest.raises(ConfigError, match=r"leave objective\.labels out"):
        OBJECTIVE.heads(("A", "B"))
    with pytest.raises(ConfigError, match=r"Take an encoder"):
        OBJECTIVE.check_model(
            EncoderDecoderConfig(max_seq_len=8, d_model=8, num_encoder_layers=1, num_heads=1)
        )
