"""Hostile files of DeepSpeed end in an error of distft, at once, in little memory, in their directory."""

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hostile.checkpoints import READ
from hostile.guard import Guard

RUN = "hostile.readers:run_cli"
TAG = "global_step2"
Files = dict[str, dict[str, Any]]


def plain_files() -> Files:
    """The files of a checkpoint of ZeRO 2 by two ranks, with 15 elements in two parameters."""
    shapes = [OrderedDict(w=torch.Size([4, 3]), b=torch.Size([3]))]
    weights = torch.arange(15.0)
    files: Files = {
        "mp_rank_00_model_states.pt": {
            "module": OrderedDict(w=weights[:12].reshape(4, 3).clone(), b=weights[12:].clone()),
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": shapes,
            "frozen_param_shapes": None,
            "shared_params": {},
            "frozen_param_fragments": None,
            "lr_scheduler": None,
            "skipped_steps": 0,
            "global_steps": 2,
            "global_samples": 4,
            "dp_world_size": 2,
            "ds_config": {"zero_optimization": {"stage": 2}},
            "ds_version": "0.19.8",
        }
    }
    for rank, part in enumerate((weights[:8], weights[8:])):
        moments = {"step": torch.tensor(2.0), "exp_avg": torch.ones(8), "exp_avg_sq": torch.ones(8)}
        files[optimizer_name(rank)] = {
            "optimizer_state_dict": {
                "base_optimizer_state": {
                    "state": {0: moments},
                    "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": [0]}],
                },
                "single_partition_of_fp32_groups": [part.clone()],
                "zero_stage": 2,
                "partition_count": [2],
            },
            "ds_config": {"zero_optimization": {"stage": 2}},
            "ds_version": "0.19.8",
        }
    return files


def optimizer_name(rank: int | str) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def write(root: Path, files: Files, latest: str = TAG) -> Path:
    (root / TAG).mkdir(parents=True)
    for name, content in files.items():
        torch.save(content, root / TAG / name)
    (root / "latest").write_text(latest)
    return root


def model(files: Files) -> dict[str, Any]:
    return files["mp_rank_00_model_states.pt"]


def of_rank_1(files: Files) -> dict[str, Any]:
    state: dict[str, Any] = files[optimizer_name(1)]["optimizer_state_dict"]
    return state


def set_in_model(key: str, value: Any) -> Callable[[Files], None]:
    return lambda files: model(files).update({key: value})


def rename(name: str) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        content = model(files)
        content["module"] = OrderedDict((name if k == "w" else k, v) for k, v in content["module"].items())
        content["param_shapes"] = [
            OrderedDict((name if k == "w" else k, v) for k, v in content["param_shapes"][0].items())
        ]

    return change


def set_shape(shape: tuple[int, ...]) -> Callable[[Files], None]:
    return lambda files: model(files)["param_shapes"][0].update(w=shape)


def set_step(step: Any) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        for rank in (0, 1):
            files[optimizer_name(rank)]["optimizer_state_dict"]["base_optimizer_state"]["state"][0][
                "step"
            ] = step

    return change


def set_everywhere(key: str, value: Any) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        for rank in (0, 1):
            files[optimizer_name(rank)]["optimizer_state_dict"][key] = value

    return change


def nest(depth: int) -> Callable[[Files], None]:
    nested: Any = 1
    for _ in range(depth):
        nested = [nested]
    return set_in_model("lr_scheduler", nested)


def double(key: str) -> Callable[[Files], None]:
    doubled: Any = ["x"]
    for _ in range(60):
        doubled = [doubled, doubled]
    return set_in_model(key, {"state": doubled})


def scale_window_of_zero(files: Files) -> None:
    content = model(files)
    content["module"] = OrderedDict((name, value.half()) for name, value in content["module"].items())
    set_everywhere("cur_scale", 2.0)(files)
    set_everywhere("scale_window", 0)(files)


def rank_with_many_digits(files: Files) -> None:
    files[optimizer_name("9" * 40)] = files[optimizer_name(1)]


FILES: dict[str, tuple[Callable[[Files], None], str]] = {
    "twenty million ranks": (set_in_model("dp_world_size", 20_000_000), "and 19,999,988 more are missing"),
    "minus one rank": (set_in_model("dp_world_size", -1), "dp_world_size"),
    "a world size that is no number": (set_in_model("dp_world_size", "2"), "dp_world_size"),
    "a rank of forty digits": (rank_with_many_digits, "belong to it"),
    "2**70 steps": (set_in_model("global_steps", 2**70), "global_steps"),
    "minus three skipped steps": (set_in_model("skipped_steps", -3), "skipped_steps"),
    "a name that goes up": (rename("../../x"), "module.../../x"),
    "an absolute name": (rename("/tmp/x"), "module./tmp/x"),
    "a name with a line break": (rename("a\nb"), "module"),
    "a name of a megabyte": (rename("a" * 2**20), "module"),
    "a stage that is no number": (
        set_everywhere("zero_stage", "two"),
        "layout of DeepSpeed 0.19 (ValueError",
    ),
    "a huge shape": (set_shape((2**40, 2**40)), "elements of group 0"),
    "a negative shape": (set_shape((-4, -3)), "param_shapes"),
    "a shape of a thousand dimensions": (set_shape((1,) * 1000), "param_shapes"),
    "negative padding": (set_everywhere("param_alignment_paddings", [[-5, 0]]), "param_alignment_paddings"),
    "huge padding": (set_everywhere("param_alignment_paddings", [[2**50, 0]]), "elements of group 0"),
    "endlessly many updates": (set_step(float("inf")), "step"),
    "minus one update": (set_step(torch.tensor(-1.0)), "step"),
    "deeply nested": (nest(90), "too many entries"),
    "a scheduler that doubles": (double("lr_scheduler"), ""),
    "a loss scale that never ends": (scale_window_of_zero, "scale_window"),
    "a module that is a list": (set_in_model("module", [1, 2]), "module"),
    "frozen shapes without weights": (set_in_model("frozen_param_shapes", {"f": (2**45,)}), ""),
    "names tied in a circle": (set_in_model("shared_params", {"w": "b", "b": "w"}), ""),
}


def test_the_plain_files_are_read(tmp_path: Path, guard: Guard) -> None:
    outcome = guard.run(READ, str(write(tmp_path, plain_files())), directories=[tmp_path])
    outcome.check()
    assert outcome.returned["parameters"] == 2
    assert outcome.returned["damage"] == []


@pytest.mark.parametrize("case", FILES)
def test_hostile_contents_are_refused(case: str, tmp_path: Path, guard: Guard) -> None:
    change, word = FILES[case]
    files = plain_files()
    change(files)
    outcome = guard.run(READ, str(write(tmp_path, files)), directories=[tmp_path])
    if word:
        outcome.check_refused(word)
    else:
        outcome.check()


@pytest.mark.parametrize("tag", ["../../x", "/etc", "..", "a/../../b", "x" * 5000, "a\0b", ""])
def test_a_tag_stays_in_its_directory(tag: str, tmp_path: Path, guard: Guard) -> None:
    root = write(tmp_path / "inner", plain_files(), latest=tag)
    guard.run(READ, str(root), directories=[root]).check_refused("latest")


def test_a_pipe_named_latest_does_not_block(tmp_path: Path, guard: Guard) -> None:
    root = write(tmp_path, plain_files())
    (root / "latest").unlink()
    os.mkfifo(root / "latest")
    guard.run(READ, str(root), directories=[root], seconds=10).check_refused()


@pytest.mark.parametrize("case", ["a scheduler that doubles", "client state that doubles"])
def test_entries_that_double_are_not_written_out(case: str, tmp_path: Path, guard: Guard) -> None:
    files = plain_files()
    double("lr_scheduler" if "scheduler" in case else "mine")(files)
    root, out = write(tmp_path / "in", files), tmp_path / "out"
    options = ("--to", "deepspeed")
    outcome = guard.run(
        RUN, "checkpoint", "convert", str(root), str(out), *options, directories=[root], writable=[tmp_path]
    )
    outcome.check()


@pytest.mark.parametrize("name", ["../../x", "/abs", "a/../../../b", "..", "a\\..\\b"])
def test_a_parameters_name_never_leaves_a_universal_checkpoint(
    name: str, tmp_path: Path, guard: Guard
) -> None:
    files = plain_files()
    rename(name)(files)
    root = write(tmp_path / "in", {"mp_rank_00_model_states.pt": model(files)})
    (root / TAG / "zero").mkdir()
    torch.save({"param_groups": [{"params": [0]}]}, root / TAG / "zero" / "optimizer_state.pt")
    (root / "latest_universal").write_text(TAG)
    guard.run(READ, str(root), directories=[root]).check_refused("module", "should match pattern")


def test_a_universal_checkpoint_of_another_layout_is_refused(tmp_path: Path, guard: Guard) -> None:
    root = write(tmp_path, {"mp_rank_00_model_states.pt": model(plain_files())})
    (root / TAG / "zero").mkdir()
    torch.save([1, 2], root / TAG / "zero" / "optimizer_state.pt")
    (root / "latest_universal").write_text(TAG)
    guard.run(READ, str(root), directories=[root]).check_refused("layout of ds_to_universal (TypeError")
