"""The rows of `gpu_check.py` as Markdown, ready for `docs/benchmarks.md`."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

JsonRow: TypeAlias = Mapping[str, Any]
_BAD = ("failed", "hung", "died")
_SPEED_COLUMNS = {
    "tokens_per_s": "tokens/s",
    "mfu": "MFU",
    "share_of_product_rate": "of the product rate",
    "step_s": "step, s",
    "micro_batch_size": "rows",
    "seq_len": "tokens a row",
    "peak_memory_gb": "peak, GB",
    "predicted_memory_gb": "predicted, GB",
    "warm_up_s": "warm-up, s",
}


def summarise(rows: Sequence[JsonRow]) -> str:
    """Machine and versions, counts by phase, what failed, and the tables of numbers."""
    parts = [
        _machine(rows),
        _counts(rows),
        *_problems(rows),
        _ratios(rows),
        _table("Speed", _of(rows, "speed", "speed-more"), _SPEED_COLUMNS),
        _table(
            "Losses against the CPU in fp32",
            _of(rows, "parity", "parity-compiled", "two-ranks"),
            {"max_difference": "largest difference", "tolerance": "allowed", "last_loss": "last loss"},
        ),
        _table(
            "Saved and resumed",
            _of(rows, "resume"),
            {"from_step": "from", "to_step": "to", "max_difference": "largest difference"},
        ),
        _table("Waits for the device", _of(rows, "sync"), {"waits_per_step": "a step", "sites": "where"}),
        _table("Generation", _of(rows, "generation"), {"new_tokens_per_s": "new tokens/s"}),
        _table(
            "One step",
            _of(rows, "profile"),
            {
                "step_s": "step, s",
                "busy_share": "busy",
                "num_launches": "kernels",
                "top": "longest",
            },
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _of(rows: Iterable[JsonRow], *phases: str) -> list[JsonRow]:
    return [row for row in rows if row["phase"] in phases]


def _machine(rows: Sequence[JsonRow]) -> str:
    about = next((row for row in rows if row["phase"] == "about"), {})
    named = [f"{name} {value}" for name, value in about.items() if name not in {"phase", "case", "status"}]
    rates = [
        f"{name}: {value}"
        for row in _of(rows, "machine")
        for name, value in row.items()
        if name.endswith(("_per_s", "_written"))
    ]
    return "\n".join([", ".join(named), ", ".join(rates)]).strip()


def _counts(rows: Sequence[JsonRow]) -> str:
    phases = dict.fromkeys(row["phase"] for row in rows if row["phase"] != "about")
    lines = []
    for phase in phases:
        found = _of(rows, phase)
        counts = Counter(row["status"] for row in found)
        seconds = sum(row.get("seconds", 0) for row in found)
        shown = ", ".join(f"{number} {status}" for status, number in counts.items())
        lines.append(f"- {phase}: {shown}; {seconds:.0f} s")
    return "\n".join(lines)


def _problems(rows: Sequence[JsonRow]) -> Iterable[str]:
    for title, statuses in (("Failed", _BAD), ("Skipped", ("skipped",))):
        lines = [
            f"- {row['phase']} / {row['case']} ({row['status']}): {_one_line(row.get('reason', ''))}"
            for row in rows
            if row["status"] in statuses
        ]
        if lines:
            yield "\n".join([f"### {title}", "", *lines])


def _ratios(rows: Sequence[JsonRow]) -> str:
    """Each speed over that of distft's local engine, compiled, in bf16 on plain rows."""
    rates = {row["case"]: row["tokens_per_s"] for row in rows if "tokens_per_s" in row}
    lines = []
    for row in _of(rows, "speed", "speed-more"):
        base = rates.get(f"{row.get('model')} distft local bf16 compiled")
        if base and row["case"] in rates:
            lines.append(f"| {row['case']} | {rates[row['case']] / base:.3f} |")
    head = ["### Tokens/s over distft local, compiled", "", "| | ratio |", "|---|---:|"]
    return "\n".join([*head, *lines]) if lines else ""


def _table(title: str, rows: Sequence[JsonRow], columns: Mapping[str, str]) -> str:
    shown = [row for row in rows if any(name in row for name in columns)]
    if not shown:
        return ""
    lines = [
        f"### {title}",
        "",
        f"| | {' | '.join(columns.values())} |",
        f"|---|{'---:|' * len(columns)}",
        *(f"| {row['case']} | {' | '.join(_cell(row.get(name)) for name in columns)} |" for row in shown),
    ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return "; ".join(map(str, value)).replace("|", "/")
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
