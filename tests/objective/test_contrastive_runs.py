"""Whole contrastive runs: resumed at another number of ranks, and in a mixture."""

from pathlib import Path
from typing import Any

import pytest
from support.rank_pool import run_ranks
from support.small_runs import logged, make_text_data, pretraining, run, run_until_power_cut

from distft.errors import ConfigError
from distft.topology import Topology


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_data(tmp_path_factory.mktemp("data"))


def contrastive(data: Path, run_dir: Path, /, **changes: Any) -> dict[str, Any]:
    """Crops of single texts with dropout, validated on pairs."""
    own = {"type": "pairs", "path": str(data / "train.jsonl"), "text": "label", "positive": "text"}
    return pretraining(
        data,
        run_dir,
        **{
            "tokenizer": str(data / "tokenizer.model"),
            "model": {
                "max_seq_len": 24,
                "d_model": 16,
                "num_layers": 1,
                "num_heads": 2,
                "dropout": 0.2,
            },
            "data": {"type": "pairs", "path": str(data / "train.jsonl"), "positive": None},
            "validation": {**own, "path": str(data / "test.jsonl")},
            "objective": {
                "type": "contrastive",
                "views": "crops",
                "crop_share": [0.3, 0.9],
                "temperature": 0.5,
            },
            "batch": {"global_batch_size": 7, "micro_batch_size": 2, "seq_len": 24},
            "train": {"max_steps": 6, "log_every_steps": 1},
            "checkpoint": {"every_steps": 2},
            **changes,
        },
    )


@pytest.mark.ranks
def test_a_run_resumes_at_another_number_of_ranks_as_if_it_had_never_stopped(
    data: Path, tmp_path: Path
) -> None:
    run(Topology(), contrastive(data, tmp_path / "straight"))
    broken = contrastive(data, tmp_path / "broken")
    run_until_power_cut(broken, 3)
    run_ranks(run, 2, {**broken, "engine": {"type": "zero", "zero_stage": 2}}, timeout_s=240)
    straight = logged(tmp_path / "straight")
    assert len(straight) == 6
    assert logged(tmp_path / "broken") == pytest.approx(straight, rel=1e-5)
    for name in ("validation/loss", "validation/recall_at_1", "validation/map"):
        expected = logged(tmp_path / "straight", name)
        assert expected
        assert logged(tmp_path / "broken", name) == pytest.approx(expected, rel=1e-4)


def test_a_mixture_takes_contrastive_learning_beside_a_language_model(data: Path, tmp_path: Path) -> None:
    raw = contrastive(data, tmp_path / "mixture")
    streams = {"texts": {"data": raw["data"]}, "words": {"data": pretraining(data, tmp_path)["data"]}}
    raw["data"] = {"type": "streams", "streams": streams}
    raw["validation"] = None
    parts = {"texts": {"objective": raw["objective"]}, "words": {"objective": {"type": "causal_lm"}}}
    raw["objective"] = {"type": "mixture", "parts": parts}
    metrics = run(Topology(), raw).metrics
    assert {"texts/loss", "words/loss"} <= metrics.keys()


def test_a_stream_too_small_for_negatives_is_refused_before_training(data: Path, tmp_path: Path) -> None:
    raw = contrastive(data, tmp_path / "small")
    words = pretraining(data, tmp_path)["data"]
    streams = {"texts": {"data": raw["data"]}, "words": {"data": words, "share": 6}}
    raw["data"] = {"type": "streams", "streams": streams}
    raw["validation"] = None
    parts = {"texts": {"objective": raw["objective"]}, "words": {"objective": {"type": "causal_lm"}}}
    raw["objective"] = {"type": "mixture", "parts": parts}
    with pytest.raises(ConfigError, match=r"objective\.parts\.texts: Of the .* this stream has 1 on average"):
        run(Topology(), raw)
    raw["data"]["alternate"] = True
    raw["train"] = {"max_steps": 3, "log_every_steps": 1}
    run(Topology(), raw)


def test_a_batch_too_small_for_negatives_is_refused_before_training(data: Path, tmp_path: Path) -> None:
    batch = {"global_batch_size": 1, "micro_batch_size": 1, "seq_len": 24}
    with pytest.raises(ConfigError, match="leaves a text without negatives"):
        run(Topology(), contrastive(data, tmp_path / "run", batch=batch))
    assert not (tmp_path / "run" / "checkpoints").exists()
