"""What can be said of launch/ without the machines that it is for: its files are valid, and agree."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
FIELDS = yaml.safe_load(Path(__file__).with_name("kuberay_fields.yaml").read_text())
CLUSTERS = [f"{kind}_{device}.yaml" for kind in ("rayjob", "raycluster") for device in ("cpu", "gpu")]
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), ROOT / ".ci/run"]
PLAIN = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "map": dict,
    "any": object,
}


def faults(value: Any, kind: Any, where: str) -> list[str]:
    """What is wrong with `value` as a field of the type that kuberay_fields.yaml writes as `kind`."""
    if isinstance(kind, list):
        if not isinstance(value, list):
            return [f"{where}: not a list"]
        return [fault for i, item in enumerate(value) for fault in faults(item, kind[0], f"{where}.{i}")]
    if kind in PLAIN:
        is_right = isinstance(value, PLAIN[kind]) and (kind == "boolean" or not isinstance(value, bool))
        if kind == "map" and is_right:
            is_right = all(isinstance(text, str) for pair in value.items() for text in pair)
        return [] if is_right or kind == "any" else [f"{where}: {value!r} is not of type {kind}"]
    if kind not in FIELDS:
        return [] if value in kind.lstrip("=").split("|") else [f"{where}: {value!r} is not {kind}"]
    if not isinstance(value, dict):
        return [f"{where}: not an object"]
    known = {name.rstrip("!"): field for name, field in FIELDS[kind].items()}
    found = [
        f"{where}.{name} is missing" for name in map(_required, FIELDS[kind]) if name and name not in value
    ]
    found += [f"{where}.{name} is not a field of {kind}" for name in value if name not in known]
    return found + [
        fault
        for name in value
        if name in known
        for fault in faults(value[name], known[name], f"{where}.{name}")
    ]


def _required(name: str) -> str:
    return name[:-1] if name.endswith("!") else ""


def _kuberay(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((LAUNCH / "kuberay" / name).read_text()))


def _cluster(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return dict(spec.get("rayClusterSpec", spec))


@pytest.mark.parametrize("name", [*CLUSTERS, "shared_volume.yaml"])
def test_kuberay_knows_every_field(name: str) -> None:
    document = _kuberay(name)
    assert faults(document, document["kind"], name) == []


@pytest.mark.parametrize(
    ("where", "value", "fault"),
    [
        ("authOptions", {"mode": "tokens"}, "'tokens' is not disabled|token"),
        ("authOption", {}, "authOption is not a field of RayClusterSpec"),
        ("workerGroupSpecs", [{"groupName": "a"}], "template is missing"),
        ("rayVersion", 2.6, "2.6 is not of type string"),
        ("headServiceAnnotations", {"a": 1}, "is not of type map"),
    ],
)
def test_the_check_of_fields_finds_faults(where: str, value: Any, fault: str) -> None:
    document = _kuberay("raycluster_cpu.yaml")
    document["spec"][where] = value
    assert any(fault in found for found in faults(document, "RayCluster", "x"))


@pytest.mark.parametrize("name", CLUSTERS)
def test_clusters_ask_for_a_token_share_a_volume_and_grow(name: str) -> None:
    cluster = _cluster(_kuberay(name))
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == _pinned("ray")
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] < group["replicas"] < group["maxReplicas"]
    claim = _kuberay("shared_volume.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in (cluster["headGroupSpec"]["template"]["spec"], group["template"]["spec"]):
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        root = {"name": "DISTFT_RUN_ROOT", "value": "/shared"}
        assert root in container["env"]
        assert volumes[mounts["/shared"]]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert pod["securityContext"]["runAsNonRoot"]
    has_gpus = "nvidia.com/gpu" in group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert has_gpus is ("gpu" in name)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_job_runs_on_the_cluster_that_stays(device: str) -> None:
    job = _kuberay(f"rayjob_{device}.yaml")
    assert _cluster(job) == _cluster(_kuberay(f"raycluster_{device}.yaml"))
    command = job["spec"]["entrypoint"].split()
    assert command[:2] == ["python", "launch/ray_train.py"]


def test_ray_s_own_schema_takes_the_cluster_file() -> None:
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    document = yaml.safe_load((LAUNCH / "ray_up.yaml").read_text())
    jsonschema.validate(document, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "worker_ips": []}, schema)
    starts = document["head_start_ray_commands"] + document["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)


def _pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def _dockerfile() -> list[tuple[str, list[str]]]:
    """Instructions and their words, in order."""
    text = (LAUNCH / "Dockerfile").read_text()
    lines = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split()[1:]) for line in lines if line.strip()]


def test_the_image_is_of_a_named_version_pinned_and_without_root() -> None:
    instructions = _dockerfile()
    bases = [words[0] for name, words in instructions if name == "FROM"]
    assert bases == ["python:3.11-slim-bookworm"] * 2
    last_stage = instructions[max(i for i, (name, _) in enumerate(instructions) if name == "FROM") :]
    assert [words for name, words in last_stage if name == "USER"] == [["1000"]]
    assert (
        "ENV",
        ["PIP_NO_CACHE_DIR=1", "PIP_CONSTRAINT=constraints.txt", "PIP_BUILD_CONSTRAINT=constraints.txt"],
    ) in (instructions)
    pods = [_cluster(_kuberay(name))["headGroupSpec"]["template"]["spec"] for name in CLUSTERS]
    assert {pod["securityContext"]["runAsUser"] for pod in pods} == {1000}


def test_the_image_takes_only_what_is_there_and_let_in() -> None:
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    taken = set()
    for name, words in _dockerfile():
        if name == "COPY" and not any(word.startswith("--from") for word in words):
            taken |= {word.rstrip("/") for word in words[:-1] if not word.startswith("--")}
    assert taken == allowed
    assert all((ROOT / path).exists() for path in taken)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_can_be_called_and_stop_at_the_first_fault(path: Path) -> None:
    assert os.access(path, os.X_OK)
    assert re.search(r"^set -euo pipefail$", path.read_text(), re.MULTILINE)


def _deepspeed(folder: Path, codes: list[int], **environment: str) -> "subprocess.CompletedProcess[str]":
    """launch/deepspeed.sh with a launcher that ends with one code after the other."""
    (folder / "codes").write_text("\n".join(map(str, codes)))
    python = folder / "python"
    python.write_text(
        f'#!/usr/bin/env bash\nprintf "%s\\n" "$*" >>{folder}/calls\n'
        f'[ -z "${{DS_ENV_FILE:-}}" ] || cp "$DS_ENV_FILE" {folder}/sent\n'
        f'code=$(head -n 1 {folder}/codes); sed -i 1d {folder}/codes; exit "$code"\n'
    )
    python.chmod(0o755)
    command = [str(LAUNCH / "deepspeed.sh"), str(LAUNCH / "hostfile.example"), "c.yaml", "train.max_steps=9"]
    env = {**os.environ, "PYTHON": str(python), "RESTART_DELAY_S": "0", **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=30)


@pytest.mark.parametrize(
    ("codes", "num_starts", "last"),
    [([0], 1, 0), ([1, 247, 0], 3, 0), ([1, 1, 1, 1, 0], 3, 1), ([2, 0], 1, 2), ([1, 75, 0], 2, 75)],
)
def test_without_ray_a_run_that_dies_is_started_again_but_not_a_mistake(
    tmp_path: Path, codes: list[int], num_starts: int, last: int
) -> None:
    done = _deepspeed(tmp_path, codes, RESTARTS="2")
    assert done.returncode == last
    calls = (tmp_path / "calls").read_text().splitlines()
    options = f"--hostfile {LAUNCH}/hostfile.example --master_port 29500"
    command = f"-m deepspeed.launcher.runner {options} {LAUNCH}/deepspeed_train.py c.yaml train.max_steps=9"
    assert calls == [command] * num_starts


def test_without_ray_all_machines_use_the_network_that_is_named(tmp_path: Path) -> None:
    _deepspeed(tmp_path, [0], NETWORK_INTERFACE="ib0", MASTER_ADDRESS="10.0.0.1")
    assert (tmp_path / "sent").read_text() == "NCCL_SOCKET_IFNAME=ib0\nGLOO_SOCKET_IFNAME=ib0\n"
    assert "--master_addr 10.0.0.1 --master_port" in (tmp_path / "calls").read_text()


def test_deepspeed_reads_the_hostfile_and_the_file_of_variables() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from deepspeed.launcher import runner as r\nimport json, sys\n"
         "print(json.dumps([r.fetch_hostfile(sys.argv[1]), r.DEEPSPEED_ENVIRONMENT_NAME]))",
         str(LAUNCH / "hostfile.example")],
        env={**os.environ, "DS_ENV_FILE": "/named"}, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == [{"node1": 8, "node2": 8}, "/named"]
