"""Complete runs from a configuration to a trained checkpoint, in one process and on several ranks."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support.rank_pool import run_ranks
from support.small_runs import events, fine_tuning, logged, pretraining, run

from distft.checkpoint.committed import find_checkpoint
from distft.checkpoint.writer_fence import WRITER_FILE
from distft.cli.main import main
from distft.config import load_yaml, parse
from distft.errors import ConfigError, DataError, DistftError, DivergedError, Preempted
from distft.run.config import RunConfig
from distft.topology import Topology
from distft.train.loop import Trainer


def test_a_run_learns_and_writes_metrics_events_and_checkpoints(pretrained: Path) -> None:
    losses = logged(pretrained)
    assert list(losses) == list(range(1, 13))
    assert losses[12] < losses[1] - 0.3
    for name in ("lr", "grad_norm", "tokens_per_s", "tokens_per_s_per_rank", "mfu", "step_s", "data_wait_s"):
        assert all(value > 0 for value in logged(pretrained, name).values()), name
    assert set(logged(pretrained, "skipped_steps").values()) == {0}
    assert {"validation/loss", "validation/perplexity", "validation/bits_per_byte"} <= {
        name
        for name in ("validation/loss", "validation/perplexity", "validation/bits_per_byte")
        if logged(pretrained, name)
    }
    assert [event["kind"] for event in events(pretrained)] == [
        "start",
        *["data"] * 2,
        *["save", "ledger"] * 3,
        "finish",
    ]
    kept = sorted(path.name for path in (pretrained / "checkpoints").iterdir())
    assert kept == ["step_00000008", "step_00000012", WRITER_FILE]


def test_a_run_of_the_written_config_yaml_repeats_the_losses(pretrained: Path, tmp_path: Path) -> None:
    raw = load_yaml(pretrained / "config.yaml")
    run(Topology(), {**raw, "run_dir": str(tmp_path)})
    assert logged(tmp_path) == logged(pretrained)


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [1, 3])
def test_zero_logs_the_same_metrics_as_the_local_engine(
    data: Path, pretrained: Path, tmp_path: Path, stage: int
) -> None:
    run_ranks(run, 2, pretraining(data, tmp_path, engine={"type": "zero", "zero_stage": stage}))
    for name in ("loss", "validation/loss", "validation/bits_per_byte", "tokens_seen"):
        assert logged(tmp_path, name) == pytest.approx(logged(pretrained, name), abs=1e-5), name


def test_starting_a_finished_run_again_changes_nothing(data: Path, tmp_path: Path) -> None:
    raw = pretraining(data, tmp_path, train={"max_steps": 4, "log_every_steps": 1})
    first = run(Topology(), raw)
    before = logged(tmp_path)
    again = run(Topology(), raw)
    assert (first.step, again.step, again.checkpoint) == (4, 4, None)
    assert logged(tmp_path) == before


@pytest.mark.ranks
def test_a_stopped_run_resumes_at_another_stage_and_world_size(
    data: Path, pretrained: Path, tmp_path: Path
) -> None:
    # A smaller max_steps would change the learning rate schedule, so a stop request ends the first half.
    raw = pretraining(data, tmp_path, engine={"type": "zero", "zero_stage": 3})
    run_ranks(_stop_after, 2, raw, 7)
    assert max(logged(tmp_path)) == 8
    run(Topology(), {**raw, "engine": {"type": "local"}})
    assert logged(tmp_path) == pytest.approx(logged(pretrained), abs=1e-5)
    kinds = [event["kind"] for event in events(tmp_path)]
    assert kinds.count("resume") == 1


def _stop_after(topology: Topology, raw: dict[str, Any], step: int) -> None:
    """Send SIGTERM to one rank, as a scheduler does, once `step` steps are complete."""
    run_step = Trainer._run_step

    def run_step_and_signal(trainer: Trainer, *arguments: Any) -> Any:
        signals = run_step(trainer, *arguments)
        if trainer.step == step and topology.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return signals

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_run_step", run_step_and_signal)
        with pytest.raises(Preempted, match=f"step {step + 1}"):  # the next step tells all ranks
            run(topology, raw)


def test_a_fine_tune_changes_only_trainable_parameters(data: Path, pretrained: Path, tmp_path: Path) -> None:
    result = run(Topology(), fine_tuning(data, tmp_path, pretrained))
    before, after = find_checkpoint(str(pretrained)), find_checkpoint(str(tmp_path))
    assert after.manifest.label_names == ["bird", "cat", "dog"]
    assert {"validation/accuracy", "validation/macro_f1"} <= result.metrics.keys()
    for name, record in after.manifest.parameters.items():
        trains = name.startswith(("classifier.", "blocks.1.", "norm."))
        assert record.trainable == trains, name
        assert set(record.states) == ({"weight", "exp_avg", "exp_avg_sq"} if trains else {"weight"}), name
        if name in before.manifest.parameters:
            same = (
                record.states["weight"].fingerprint
                == before.manifest.parameters[name].states["weight"].fingerprint
            )
            assert same != trains, name


@pytest.mark.parametrize("to", ["huggingface", "deepspeed", "universal"])
def test_a_fine_tune_starts_from_any_format(data: Path, pretrained: Path, tmp_path: Path, to: str) -> None:
    assert main(["checkpoint", "convert", str(pretrained), str(tmp_path / "other"), "--to", to]) == 0
    run(Topology(), fine_tuning(data, tmp_path / "a", pretrained))
    raw = fine_tuning(data, tmp_path / "b", tmp_path / "other", tokenizer=str(data / "tokenizer.model"))
    if to != "huggingface":
        with pytest.raises(ConfigError, match="has no model configuration: set model"):
            run(Topology(), raw)
        raw["model"] = pretraining(data, tmp_path)["model"]
    run(Topology(), raw)
    assert logged(tmp_path / "b") == logged(tmp_path / "a")


def test_a_resume_with_another_model_or_seed_is_refused(data: Path, pretrained: Path) -> None:
    changed = pretraining(data, pretrained, seed=5, train={"max_steps": 20, "log_every_steps": 1})
    with pytest.raises(ConfigError, match=r"seed was 0 and is now 5.*\n.*another run_dir"):
        run(Topology(), changed)
    changed["model"] = {**changed["model"], "d_model": 32}
    with pytest.raises(
        ConfigError, match=r"^model.d_model was 16 and is now 32\.\nmodel.head_dim was 8 and is"
    ):
        run(Topology(), changed)


def test_an_init_from_with_other_shapes_is_refused(data: Path, pretrained: Path, tmp_path: Path) -> None:
    wider = pretraining(data, tmp_path, init_from=str(pretrained))
    wider["model"] = {**wider["model"], "d_model": 32}
    with pytest.raises(
        ConfigError, match=r"embed.weight has shape \[\d+, 16\] there and \[\d+, 32\] in this model"
    ):
        run(Topology(), wider)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"trainable": ["block.1.*"]}, ConfigError, r"'block.1.\*' matches none .* the closest are 'blocks"),
        ({"tokenizer": "no.model"}, DataError, r"tokenizer no.model cannot be read"),
        ({"init_from": "nowhere"}, DistftError, r"init_from: nowhere does not exist"),
        ({"objective": {"type": "classification"}}, ConfigError, r"needs labels: set data.type=labelled"),
        (
            {"data": {"type": "labelled", "path": "gone.jsonl"}, "objective": {"type": "classification"}},
            DataError,
            r"gone.jsonl",
        ),
        (
            {"optim": {"schedule": {"type": "cosine", "warmup_steps": 99}}},
            ConfigError,
            r"warmup_steps=99",
        ),
    ],
)
def test_a_wrong_setting_is_reported_before_anything_is_written(
    data: Path, tmp_path: Path, changes: dict[str, Any], error: type[DistftError], message: str
) -> None:
    raw = pretraining(data, tmp_path / "run", **{"tokenizer": str(data / "tokenizer.model"), **changes})
    with pytest.raises(error, match=message):
        run(Topology(), raw)
    assert not (tmp_path / "run").exists()


def test_a_run_dir_that_cannot_be_created_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("taken")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"file is a file\. Choose another run_dir"):
            run(Topology(), pretraining(data, run_dir))
    with pytest.raises(ConfigError, match=r"/proc/nowhere/run cannot be created: No such file"):
        run(Topology(), pretraining(data, Path("/proc/nowhere/run")))


def test_missing_data_is_reported_rather_than_its_missing_tokenizer(data: Path, tmp_path: Path) -> None:
    raw = pretraining(data, tmp_path, data={"type": "tokens", "sources": [{"path": str(tmp_path / "no")}]})
    with pytest.raises(DataError, match=r"data\.sources\.0\.path: .*no does not exist"):
        run(Topology(), raw)


def test_the_resume_event_lists_changed_settings(data: Path, tmp_path: Path) -> None:
    run(Topology(), pretraining(data, tmp_path, train={"max_steps": 4, "log_every_steps": 1}))
    run(Topology(), pretraining(data, tmp_path, train={"max_steps": 6, "log_every_steps": 1}))
    (resume,) = (event for event in events(tmp_path) if event["kind"] == "resume")
    assert resume["changed"] == "train.max_steps"


def test_more_ranks_than_sequences_are_refused_with_the_largest_number_that_works(
    data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="at most 8 ranks"):
        run(Topology(rank=0, world_size=9), pretraining(data, tmp_path, engine={"type": "zero"}))


def test_the_local_engine_refuses_several_ranks(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="local is one process, but 2 ranks"):
        run(Topology(rank=0, world_size=2), pretraining(data, tmp_path))


def test_all_contradictions_of_a_configuration_are_reported_at_once(data: Path, tmp_path: Path) -> None:
    raw = pretraining(data, tmp_path, batch={"global_batch_size": 2, "micro_batch_size": 4, "seq_len": 99})
    with pytest.raises(ConfigError) as caught:
        parse(RunConfig, raw)
    assert "micro_batch_size=4 is more than batch.global_batch_size=2" in str(caught.value)
    assert "seq_len=99 is more than model.max_seq_len=24" in str(caught.value)


def test_all_problems_with_a_configurations_inputs_are_reported_at_once(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("taken")
    labelled = {"type": "labelled", "path": str(data / "train.jsonl")}
    raw = pretraining(
        data,
        tmp_path / "file",
        tokenizer=str(data / "tokenizer.model"),
        data={**labelled, "text": "body"},
        validation={**labelled, "label": "class"},
        objective={"type": "classification"},
        trainable=["blocks.9.*"],
    )
    with pytest.raises(ConfigError) as caught:
        run(Topology(world_size=9), raw)
    for problem in (
        "local is one process",
        "at most 8 ranks",
        "Choose another run_dir",
        "has no column 'body'",
        "has no column 'class'",
        "'blocks.9.*' matches none",
    ):
        assert str(caught.value).count(problem) == 1, problem
    assert len(str(caught.value).splitlines()) == 6


def test_consecutive_steps_with_non_finite_gradients_end_the_run_and_keep_the_last_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distft.objective.causal_lm import CausalLM

    loss_sums = CausalLM.loss_sums
    calls = {"left": 4 * 4 + 2}  # four good steps of four micro-batches, and half of the fifth

    def loss_or_nan(self: CausalLM, *arguments: Any) -> Any:
        calls["left"] -= 1
        factor = 1.0 if calls["left"] >= 0 else float("nan")
        return {name: value * factor for name, value in loss_sums(self, *arguments).items()}

    monkeypatch.setattr(CausalLM, "loss_sums", loss_or_nan)
    raw = pretraining(
        data, tmp_path, train={"max_steps": 12, "log_every_steps": 1, "max_skipped_in_a_row": 3}
    )
    with pytest.raises(DivergedError, match="Steps 5 to 7 all had gradients that are not finite"):
        run(Topology(), raw)
    assert max(logged(tmp_path, "skipped_steps").values()) == 2  # the third ends the run before it is logged
    assert find_checkpoint(str(tmp_path)).step == 4


def test_unreadable_data_causes_no_error_about_its_labels(data: Path, tmp_path: Path) -> None:
    raw = pretraining(data, tmp_path, tokenizer=str(data / "tokenizer.model"))
    raw["data"]["sources"][0]["path"] = str(data / "shards")  # train/ is below it
    with pytest.raises(DistftError) as caught:
        run(Topology(), raw)
    assert "labels" not in str(caught.value)
    raw["objective"] = {"type": "classification"}
    with pytest.raises(DistftError) as caught:
        run(Topology(), raw)
    assert str(data / "shards") in str(caught.value)
