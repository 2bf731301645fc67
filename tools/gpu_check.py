"""Checks and measures distft on a GPU: `bash tools/gpu_check.sh`, then `python tools/gpu_check.py --out DIR`.

Runs within a budget of time, the most telling phases first, each in a process of its own with a time limit.
Writes into DIR, as results come: `rows.jsonl` (a JSON object a case), `summary.md` (tables for
docs/benchmarks.md), `kernels.jsonl` (time by kernel of a step) and `log.txt`. `--dry` runs every phase in a
tiny size on a CPU. Exits with 1 if a case failed, hung or died.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gpu_check_runner import JsonRow, Phase, Runner
from gpu_check_summary import summarise

_ROOT = Path(__file__).resolve().parent.parent
_COMMIT_FILE = _ROOT / ".wheels" / "commit.txt"  # by gpu_check.sh: the GPU's machine may have no .git
_REFERENCES = _ROOT / ".wheels" / "references"  # by gpu_check.sh --references, or absent
_KERNELS_FILE = "kernels.jsonl"
_DRY_LIMIT_S = 1200.0  # a dry run takes a minute, but on a machine as busy as it may be
_MAX_LOG_BYTES = 8_000_000  # of a machine's 16 MiB for a file
_PACKAGES = ("torch", "triton", "deepspeed", "transformers", "torchao", "pydantic", "numpy")

# The most telling first. Together they may exceed the budget: then the last ones are skipped.
PHASES = (
    Phase("machine", 90),
    Phase("parity", 150),
    Phase("speed", 150, starts_fresh=True),
    Phase("sync", 40),
    Phase("resume", 80, starts_fresh=True),
    Phase("parity-compiled", 110, starts_fresh=True),
    Phase("two-ranks", 60),
    Phase("parity-models", 120),
    Phase("profile", 80, starts_fresh=True),
    Phase("generation", 60),
    Phase("speed-more", 300, starts_fresh=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a directory for the results")
    parser.add_argument("--phase", nargs="+", choices=[phase.name for phase in PHASES], help="only these")
    parser.add_argument("--case", nargs="+", default=["*"], help="only cases whose names match these globs")
    parser.add_argument("--budget-s", type=float, default=480, help="for all phases together; not with --dry")
    parser.add_argument("--dry", action="store_true", help="a tiny size on a CPU")
    arguments = parser.parse_args()
    phases = [phase for phase in PHASES if arguments.phase is None or phase.name in arguments.phase]
    rows = check(
        phases,
        arguments.out,
        case_patterns=arguments.case,
        budget_s=arguments.budget_s,
        dry=arguments.dry,
    )
    sys.exit(any(row["status"] in {"failed", "hung", "died"} for row in rows))


def check(
    phases: list[Phase], out: Path, *, case_patterns: Sequence[str], budget_s: float, dry: bool
) -> list[JsonRow]:
    """Run the phases; returns all rows, which are also in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    worker = Path(__file__).with_name("gpu_check_phases.py")
    command = [sys.executable, str(worker), *(["--dry"] if dry else [])]
    rows: list[JsonRow] = []
    with (
        tempfile.TemporaryDirectory(prefix="gpu_check_") as work_dir,
        (out / "rows.jsonl").open("w", buffering=1) as file,
    ):
        if _REFERENCES.exists() and not dry:
            shutil.copytree(_REFERENCES, work_dir, dirs_exist_ok=True)

        def emit(row: JsonRow) -> None:
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            shown = {k: v for k, v in row.items() if k not in {"traceback", "log", "top", "sites"}}
            print(json.dumps(shown), flush=True)

        emit({"phase": "about", "case": "*", "status": "ok", **_about()})
        runner = Runner(
            command,
            work_dir=Path(work_dir),
            budget_s=_DRY_LIMIT_S if dry else budget_s,
            emit=emit,
            dry=dry,
            case_patterns=case_patterns,
        )
        try:
            for phase in phases:
                runner.run(_dry_phase(phase) if dry else phase)
                # After each phase, in case this process does not live until the end.
                _write_results(rows, Path(work_dir), out)
        finally:
            runner.close()
            _write_results(rows, Path(work_dir), out)
    return rows


def _dry_phase(phase: Phase) -> Phase:
    """With ample time, and a new process only for whole runs, which need one: starting one takes seconds."""
    return replace(phase, limit_s=_DRY_LIMIT_S, starts_fresh=phase.name == "resume")


def _write_results(rows: list[JsonRow], work_dir: Path, out: Path) -> None:
    (out / "summary.md").write_text(summarise(rows))
    if (work_dir / _KERNELS_FILE).exists():
        shutil.copyfile(work_dir / _KERNELS_FILE, out / _KERNELS_FILE)
    logs = [f"=== {path.stem}\n{path.read_text(errors='replace')}" for path in sorted(work_dir.glob("*.log"))]
    (out / "log.txt").write_bytes("\n".join(logs).encode()[-_MAX_LOG_BYTES:])


def _about() -> JsonRow:
    """When, where and what; without torch, whose import takes seconds."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "card": _card(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _commit() -> str:
    found = _output_of("git", "-C", str(_ROOT), "describe", "--always", "--dirty")
    return found or (_COMMIT_FILE.read_text().strip() if _COMMIT_FILE.exists() else "unknown")


def _card() -> str:
    query = "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm"
    return _output_of("nvidia-smi", query, "--format=csv,noheader") or "no GPU"


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
