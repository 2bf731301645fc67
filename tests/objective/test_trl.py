"""Fine-tunings have the losses of TRL's trainers on the same rows and weights, step by step.

`tools/trl_losses.py` wrote tests/golden/trl, in an environment with TRL.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from support.small_runs import logged, run

from distft.topology import Topology

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "trl"
THEIRS: dict[str, Any] = json.loads((GOLDEN / "losses.json").read_text())
SETTINGS = THEIRS["settings"]
PREFERENCE = {"type": "preference", "beta": SETTINGS["beta"]}
REFERRED = {**PREFERENCE, "reference": str(GOLDEN / "reference")}
PAIRS = {"type": "preferences", "path": "pairs.jsonl"}
# Data and objective, by the name of TRL's losses
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "completions": ({"type": "completion", "path": "completions.jsonl"}, {"type": "causal_lm"}),
    "chats": ({"type": "conversations", "path": "chats.jsonl", "too_long": "refuse"}, {"type": "causal_lm"}),
    "dpo": (PAIRS, REFERRED),
    "dpo_chats": ({**PAIRS, "path": "chat_pairs.jsonl", "format": "messages"}, REFERRED),
    "dpo_sft": (PAIRS, {**REFERRED, "sft_weight": SETTINGS["sft_weight"]}),
    "ipo": (PAIRS, {**REFERRED, "loss": "ipo"}),
    "orpo": (PAIRS, {**PREFERENCE, "loss": "orpo", "sft_on_prompt": True}),
}


def losses(data: dict[str, Any], objective: dict[str, Any], run_dir: Path) -> list[float]:
    """Of each step of a training on all rows, two at a time."""
    path = GOLDEN / data["path"]
    raw = {
        "run_dir": str(run_dir),
        "device": "cpu",
        "init_from": str(GOLDEN / "model"),
        "objective": objective,
        "data": {**data, "path": str(path)},
        "batch": {
            "global_batch_size": len(path.read_text().splitlines()),
            "micro_batch_size": 2,
            "seq_len": 191,
        },
        "optim": {
            "peak_lr": SETTINGS["peak_lr"],
            "schedule": {"type": "constant"},
            "weight_decay": 0.0,
            "max_grad_norm": None,
        },
        "train": {"max_steps": len(THEIRS["losses"]["dpo"]), "log_every_steps": 1},
        "engine": {"compile": False},
    }
    run(Topology(), raw)
    return list(logged(run_dir).values())


@pytest.mark.parametrize("name", CASES)
def test_every_step_has_the_loss_of_trl(name: str, tmp_path: Path) -> None:
    expected = THEIRS["losses"][name]
    assert losses(*CASES[name], tmp_path / "run") == pytest.approx(expected, rel=0, abs=1e-5)


def test_all_losses_of_trl_are_compared() -> None:
    assert set(CASES) == set(THEIRS["losses"])
