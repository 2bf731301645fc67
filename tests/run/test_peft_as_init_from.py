"""A run that begins with an adapter directory of PEFT: it goes on, is merged in, or is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_runs import fine_tuning, run
from torch import Tensor

from distft.checkpoint.adapters import merged
from distft.checkpoint.formats.detect import open_source
from distft.cli.main import main
from distft.config.yaml_text import to_yaml
from distft.errors import CheckpointError, ConfigError
from distft.run.config import load_run_config
from distft.run.train import run_training
from distft.topology import Topology

STEP = {"max_steps": 1, "log_every_steps": 1}


@pytest.fixture(scope="module")
def root(data: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the pretrained model, a run with adapters on it, and these as PEFT has them."""
    root = tmp_path_factory.mktemp("peft")
    assert main(["checkpoint", "convert", str(pretrained), str(root / "hf"), "--to", "huggingface"]) == 0
    raw = fine_tuning(data, root / "run", root / "hf", lora={"rank": 2}, train=STEP)
    raw["optim"] = {"peak_lr": 0.1, "schedule": {"type": "constant"}}
    del raw["trainable"]
    run(Topology(), raw)
    assert main(["checkpoint", "convert", str(root / "run"), str(root / "adapter"), "--to", "peft"]) == 0
    return root


def _weight(path: Path) -> Tensor:
    return merged(open_source(str(path))).read("blocks.1.attn.q.weight", "weight", 0, 256)


def _file(data: Path, folder: Path, init_from: str, **changes: Any) -> str:
    """A configuration that does not move the weights."""
    raw = fine_tuning(data, folder / "run", Path(init_from), train=STEP, optim={"peak_lr": 1e-30})
    raw |= {"init_from": init_from, **changes}
    (folder / "run.yaml").write_text(to_yaml(raw))
    return str(folder / "run.yaml")


def test_it_goes_on_with_lora_and_is_merged_in_without(root: Path, data: Path, tmp_path: Path) -> None:
    expected = _weight(root / "run")
    assert not torch.allclose(expected, _weight(root / "hf"), atol=1e-3)
    adapter = f"{root}/../{root.name}/adapter"  # two dots are part of no key
    for name, changes in (("on", {"lora": {}, "trainable": ["@lora", "classifier.*"]}), ("merged", {})):
        (tmp_path / name).mkdir()
        run_training(load_run_config(_file(data, tmp_path / name, adapter, **changes)), Topology())
        torch.testing.assert_close(_weight(tmp_path / name / "run"), expected, atol=1e-6, rtol=0)
        has_adapters = (
            "blocks.1.attn.q.lora_a" in open_source(str(tmp_path / name / "run")).manifest.parameters
        )
        assert has_adapters == (name == "on")


@pytest.mark.parametrize("base", [None, "org/model"])
def test_a_base_that_is_not_named_or_not_here_is_one_error(
    root: Path, data: Path, tmp_path: Path, base: str | None
) -> None:
    shutil.copytree(root / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}))
    problem = rf"base_model_name_or_path={base!r} is no directory here: set it to that of the transformers"
    with pytest.raises(CheckpointError, match=problem):
        run_training(load_run_config(_file(data, tmp_path, str(tmp_path / "adapter"))), Topology())
    with pytest.raises(ConfigError, match=rf"lora.rank is missing.*\n.*cannot be read: .*{problem}"):
        load_run_config(_file(data, tmp_path, str(tmp_path / "adapter"), lora={}))


def test_a_pickled_adapter_is_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").rename(tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model.bin is a pickle, .* save it again"):
        open_source(str(tmp_path / "adapter"))


def test_another_rank_than_the_adapters_is_refused(root: Path, data: Path, tmp_path: Path) -> None:
    config = load_run_config(_file(data, tmp_path, str(root / "adapter"), lora={"rank": 4}))
    with pytest.raises(ConfigError, match=r"lora.rank is 2 in .*adapter and 4 here"):
        run_training(config, Topology())


@pytest.mark.parametrize("kind", ["adapter", "run"])
def test_adapters_that_went_on_are_exported_for_the_model_below_all_of_them(
    root: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    changes = {"lora": {}, "trainable": ["@lora", "classifier.*"]}
    run_training(load_run_config(_file(data, tmp_path, str(root / kind), **changes)), Topology())
    target = tmp_path / "adapter"
    assert main(["checkpoint", "convert", str(tmp_path / "run"), str(target), "--to", "peft"]) == 0
    base = json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(root / "hf")
    assert "The base is" not in capsys.readouterr().err
    torch.testing.assert_close(_weight(target), _weight(tmp_path / "run"), atol=1e-6, rtol=0)
