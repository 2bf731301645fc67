"""The files of launch/ are valid and agree with each other: checked without a cluster."""

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
PYTHON_TYPES = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "map": dict,
    "any": object,
}


def schema_errors(value: Any, kind: Any, where: str) -> list[str]:
    """Where `value` does not match `kind`, a type in the notation of kuberay_fields.yaml."""
    if isinstance(kind, list):
        if not isinstance(value, list):
            return [f"{where}: not a list"]
        return [
            error for i, item in enumerate(value) for error in schema_errors(item, kind[0], f"{where}.{i}")
        ]
    if kind in FIELDS:
        return object_errors(value, kind, where)
    if kind not in PYTHON_TYPES:
        return [] if value in kind.lstrip("=").split("|") else [f"{where}: {value!r} is not {kind}"]
    is_valid = isinstance(value, PYTHON_TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
    if kind == "map" and is_valid:
        is_valid = all(isinstance(text, str) for pair in value.items() for text in pair)
    return [] if is_valid or kind == "any" else [f"{where}: {value!r} is not of type {kind}"]


def object_errors(value: Any, kind: str, where: str) -> list[str]:
    """Where `value` does not match the object type `kind`: missing, unknown and wrongly typed fields."""
    if not isinstance(value, dict):
        return [f"{where}: not an object"]
    known = {name.rstrip("!"): field for name, field in FIELDS[kind].items()}
    required = {name.rstrip("!") for name in FIELDS[kind] if name.endswith("!")}
    found = [f"{where}.{name} is missing" for name in known if name in required and name not in value]
    found += [f"{where}.{name} is not a field of {kind}" for name in value if name not in known]
    for name in value:
        if name in known:
            found += schema_errors(value[name], known[name], f"{where}.{name}")
    return found


def _kuberay(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((LAUNCH / "kuberay" / name).read_text()))


def _cluster(name: str) -> dict[str, Any]:
    """The RayClusterSpec of a RayCluster or a RayJob."""
    spec = _kuberay(name)["spec"]
    return dict(spec.get("rayClusterSpec", spec))


def _pods(name: str) -> list[dict[str, Any]]:
    """The pod specs of the head and of the worker group."""
    cluster = _cluster(name)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("name", [*CLUSTERS, "shared_volume.yaml"])
def test_every_field_of_a_kuberay_file_is_one_that_kuberay_knows(name: str) -> None:
    document = _kuberay(name)
    assert schema_errors(document, document["kind"], name) == []


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("authOptions", {"mode": "tokens"}, "'tokens' is not disabled|token"),
        ("authOption", {}, "authOption is not a field of RayClusterSpec"),
        ("workerGroupSpecs", [{"groupName": "a"}], "template is missing"),
        ("rayVersion", 2.6, "2.6 is not of type string"),
        ("headServiceAnnotations", {"a": 1}, "is not of type map"),
    ],
)
def test_the_check_of_kuberay_fields_finds_errors(field: str, value: Any, error: str) -> None:
    document = _kuberay("raycluster_cpu.yaml")
    document["spec"][field] = value
    assert any(error in found for found in schema_errors(document, "RayCluster", "x"))


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_kuberay_cluster_requires_a_token(name: str) -> None:
    assert _cluster(name)["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_kuberay_cluster_names_the_pinned_version_of_ray(name: str) -> None:
    assert _cluster(name)["rayVersion"] == _pinned("ray")


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_kuberay_cluster_can_lose_and_gain_workers(name: str) -> None:
    (group,) = _cluster(name)["workerGroupSpecs"]
    assert group["minReplicas"] < group["replicas"] < group["maxReplicas"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_all_pods_mount_the_shared_volume_where_runs_are_written(name: str) -> None:
    claim = _kuberay("shared_volume.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in _pods(name):
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert {"name": "DISTFT_RUN_ROOT", "value": "/shared"} in container["env"]
        assert volumes[mounts["/shared"]]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_workers_have_gpus_only_in_the_gpu_files(name: str) -> None:
    _, worker = _pods(name)
    assert ("nvidia.com/gpu" in worker["containers"][0]["resources"]["limits"]) is ("gpu" in name)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_rayjob_and_raycluster_describe_the_same_cluster(device: str) -> None:
    assert _cluster(f"rayjob_{device}.yaml") == _cluster(f"raycluster_{device}.yaml")


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_rayjob_runs_the_driver_of_distft(device: str) -> None:
    command = _kuberay(f"rayjob_{device}.yaml")["spec"]["entrypoint"].split()
    assert command[:2] == ["python", "launch/ray_train.py"]


def test_ray_up_yaml_is_valid_by_ray_s_own_schema() -> None:
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    document = yaml.safe_load((LAUNCH / "ray_up.yaml").read_text())
    jsonschema.validate(document, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "worker_ips": []}, schema)


def test_ray_up_yaml_starts_every_node_with_a_token() -> None:
    document = yaml.safe_load((LAUNCH / "ray_up.yaml").read_text())
    for commands in (document["head_start_ray_commands"], document["worker_start_ray_commands"]):
        starts = [command for command in commands if "ray start" in command]
        assert starts
        assert all("RAY_AUTH_MODE=token" in command for command in starts)


def _pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def _dockerfile() -> list[tuple[str, list[str]]]:
    """Each instruction of launch/Dockerfile with its arguments."""
    text = (LAUNCH / "Dockerfile").read_text()
    lines = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split()[1:]) for line in lines if line.strip()]


def test_the_image_starts_from_a_fixed_version_of_python() -> None:
    bases = [words[0] for name, words in _dockerfile() if name == "FROM"]
    assert bases == ["python:3.11-slim-bookworm"] * 2


def test_the_image_installs_only_pinned_packages() -> None:
    constraints = ["PIP_CONSTRAINT=constraints.txt", "PIP_BUILD_CONSTRAINT=constraints.txt"]
    assert ("ENV", ["PIP_NO_CACHE_DIR=1", *constraints]) in _dockerfile()


def test_the_image_and_all_pods_run_as_the_same_user_who_is_not_root() -> None:
    instructions = _dockerfile()
    last_stage = instructions[max(i for i, (name, _) in enumerate(instructions) if name == "FROM") :]
    assert [words for name, words in last_stage if name == "USER"] == [["1000"]]
    contexts = [pod["securityContext"] for name in CLUSTERS for pod in _pods(name)]
    assert all(context["runAsNonRoot"] and context["runAsUser"] == 1000 for context in contexts)


def test_the_image_copies_exactly_the_files_that_dockerignore_allows() -> None:
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = set()
    for name, words in _dockerfile():
        if name == "COPY" and not any(word.startswith("--from") for word in words):
            copied |= {word.rstrip("/") for word in words[:-1] if not word.startswith("--")}
    assert copied == allowed
    assert all((ROOT / path).exists() for path in copied)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_and_stop_at_the_first_error(path: Path) -> None:
    assert os.access(path, os.X_OK)
    assert re.search(r"^set -euo pipefail$", path.read_text(), re.MULTILINE)


def _run_deepspeed_sh(
    folder: Path, exit_codes: list[int], **environment: str
) -> "subprocess.CompletedProcess[str]":
    """launch/deepspeed.sh with a stub of DeepSpeed's launcher, which exits with one code after the other.

    The stub appends its arguments to `calls` and copies the nodes' environment file to `node_environment`.
    """
    (folder / "codes").write_text("\n".join(map(str, exit_codes)))
    python = folder / "python"
    python.write_text(
        f'#!/usr/bin/env bash\nprintf "%s\\n" "$*" >>{folder}/calls\n'
        f'[ -z "${{DS_ENV_FILE:-}}" ] || cp "$DS_ENV_FILE" {folder}/node_environment\n'
        f'code=$(head -n 1 {folder}/codes); sed -i 1d {folder}/codes; exit "$code"\n'
    )
    python.chmod(0o755)
    command = [str(LAUNCH / "deepspeed.sh"), str(LAUNCH / "hostfile.example"), "c.yaml", "train.max_steps=9"]
    env = {**os.environ, "PYTHON": str(python), "RESTART_DELAY_S": "0", **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=30)


@pytest.mark.parametrize(
    ("exit_codes", "num_starts", "last"),
    [([0], 1, 0), ([1, 247, 0], 3, 0), ([1, 1, 1, 1, 0], 3, 1), ([2, 0], 1, 2), ([1, 75, 0], 2, 75)],
)
def test_deepspeed_sh_restarts_a_run_that_crashed_but_not_one_with_a_user_error_or_stopped(
    tmp_path: Path, exit_codes: list[int], num_starts: int, last: int
) -> None:
    done = _run_deepspeed_sh(tmp_path, exit_codes, RESTARTS="2")
    assert done.returncode == last
    calls = (tmp_path / "calls").read_text().splitlines()
    options = f"--hostfile {LAUNCH}/hostfile.example --master_port 29500"
    command = f"-m deepspeed.launcher.runner {options} {LAUNCH}/deepspeed_train.py c.yaml train.max_steps=9"
    assert calls == [command] * num_starts


def test_deepspeed_sh_sets_the_network_interface_on_all_nodes(tmp_path: Path) -> None:
    _run_deepspeed_sh(tmp_path, [0], NETWORK_INTERFACE="ib0", MASTER_ADDRESS="10.0.0.1")
    variables = (tmp_path / "node_environment").read_text()
    assert variables == "NCCL_SOCKET_IFNAME=ib0\nGLOO_SOCKET_IFNAME=ib0\n"
    assert "--master_addr 10.0.0.1 --master_port" in (tmp_path / "calls").read_text()


def test_deepspeed_reads_the_example_hostfile_and_ds_env_file() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from deepspeed.launcher import runner as r\nimport json, sys\n"
         "print(json.dumps([r.fetch_hostfile(sys.argv[1]), r.DEEPSPEED_ENVIRONMENT_NAME]))",
         str(LAUNCH / "hostfile.example")],
        env={**os.environ, "DS_ENV_FILE": "/named"}, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == [{"node1": 8, "node2": 8}, "/named"]
