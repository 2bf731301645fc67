"""Low precision in training and resume; evaluation and generation from a checkpoint."""

from pathlib import Path

import pytest
import torch
from support.rank_pool import run_ranks
from support.small_runs import fine_tuning, logged, pretraining, run, run_until_power_cut

from distft.checkpoint.committed import find_checkpoint
from distft.config import parse
from distft.run.config import RunConfig
from distft.run.engines import choose_device
from distft.run.generate import GenerationOptions, generate_text
from distft.run.pretrained import evaluate_checkpoint
from distft.topology import Topology


@pytest.fixture(scope="module")
def classifier(data: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("classifier")
    run(Topology(), fine_tuning(data, run_dir, pretrained))
    return run_dir


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_low_precision_run_resumes_exactly_with_its_loss_scale(
    data: Path, tmp_path: Path, precision: str
) -> None:
    engine = {"type": "local", "param_dtype": precision}
    run(Topology(), pretraining(data, tmp_path / "straight", engine=engine))
    broken = pretraining(data, tmp_path / "broken", engine=engine)
    run_until_power_cut(broken, 6)
    run(Topology(), broken)
    for name in ("loss", "skipped_steps", *(["loss_scale"] if precision == "fp16" else [])):
        straight = logged(tmp_path / "straight", name)
        assert straight, name
        assert logged(tmp_path / "broken", name) == straight, name
    saved = find_checkpoint(str(tmp_path / "broken")).manifest.progress.loss_scale
    assert (saved is not None) == (precision == "fp16")


def test_low_precision_losses_are_close_to_those_of_fp32(
    data: Path, pretrained: Path, tmp_path: Path
) -> None:
    # Seen: 2.9e-4 and 4e-5.
    for precision, tolerance in (("bf16", 1e-3), ("fp16", 2e-4)):
        engine = {"type": "local", "param_dtype": precision}
        run(Topology(), pretraining(data, tmp_path / precision, engine=engine))
        assert logged(tmp_path / precision) == pytest.approx(logged(pretrained), abs=tolerance)


def _evaluate(topology: Topology, path: str, overrides: list[str]) -> dict[str, float]:
    return evaluate_checkpoint(path, overrides, topology)


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 3])
def test_evaluation_metrics_do_not_depend_on_the_number_of_ranks(
    pretrained: Path, classifier: Path, world_size: int
) -> None:
    for run_dir in (pretrained, classifier):
        alone = evaluate_checkpoint(str(run_dir), [], Topology())
        # Neither the ranks nor the micro-batches divide 19 rows, or the number of packed ones, evenly.
        for found in run_ranks(_evaluate, world_size, str(run_dir), ["evaluation.micro_batch_size=4"]):
            assert found == pytest.approx(alone, abs=1e-6)


def test_evaluate_reproduces_the_last_evaluation_of_a_run(classifier: Path) -> None:
    found = evaluate_checkpoint(str(classifier), [], Topology())
    for name, value in found.items():
        assert list(logged(classifier, f"validation/{name}").values())[-1] == pytest.approx(value, abs=1e-6)


def test_generation_depends_only_on_its_seed_and_starts_with_the_prompt(pretrained: Path) -> None:
    first, second, other = (
        generate_text(
            str(pretrained),
            ["the cat", "a"],
            GenerationOptions(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=seed),
            on_note=lambda _: None,
        )
        for seed in (1, 1, 2)
    )
    assert first == second != other
    assert first[0].startswith("the cat")


@pytest.mark.parametrize("allowed", [True, False])
def test_on_a_gpu_fp32_products_round_to_tf32_only_if_the_run_allows_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", not allowed)
    raw = pretraining(data, tmp_path, device="cuda", engine={"type": "local", "allow_tf32": allowed})
    config: RunConfig = parse(RunConfig, raw)
    assert choose_device(config, Topology()) == torch.device("cuda", 0)
    assert torch.backends.cuda.matmul.allow_tf32 == allowed
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
