"""Training from token shards at a URL gives what training from local ones gives, after a resume too."""

from pathlib import Path

import pytest
from support.s3_server import S3Server
from support.small_runs import logged, make_text_data, pretraining, run, run_until_power_cut

from distft.topology import Topology


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_data(tmp_path_factory.mktemp("data"))


def test_training_from_shards_on_s3_gives_the_losses_of_local_ones_and_resumes(
    s3: S3Server, folder: Path, tmp_path: Path
) -> None:
    bucket = s3.make_bucket()
    client = s3.client()
    for path in (folder / "shards").rglob("*"):
        if path.is_file():
            key = f"shards/{path.relative_to(folder / 'shards')}"
            client.put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=path.read_bytes())
    remote = {
        name: {"type": "tokens", "sources": [{"path": f"{bucket}/shards/{split}"}]}
        for name, split in (("data", "train"), ("validation", "validation"))
    }
    run(Topology(), pretraining(folder, tmp_path / "local"))
    raw = pretraining(folder, tmp_path / "remote", **remote)  # its tokenizer is found beside the shards
    run_until_power_cut(raw, 6)
    run(Topology(), raw)
    for name in ("loss", "validation/loss"):
        assert logged(tmp_path / "remote", name) == logged(tmp_path / "local", name)
    assert logged(tmp_path / "remote")
