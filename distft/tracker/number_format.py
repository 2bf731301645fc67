"""Formats numbers, durations and the metrics of a step for people."""

from collections.abc import Iterable

_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_LARGE = 1000
_LOSS = "/loss"  # ends the name of a term's loss


def duration(seconds: float) -> str:
    """Seconds as `00:12`, `1:02:03`, `2d 03:04:05`."""
    whole = max(round(seconds), 0)
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, second = divmod(rest, 60)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}:{second:02d}"
    return f"{hours}:{minutes:02d}:{second:02d}" if hours else f"{minutes:02d}:{second:02d}"


def number(value: float) -> str:
    """An integer with thousands separators; a float with about four significant digits."""
    if isinstance(value, int) or abs(value) >= _LARGE:
        return f"{value:,.0f}"
    return f"{value:.4g}" if value == 0 or abs(value) < 1e-3 else f"{value:.4f}".rstrip("0").rstrip(".")


def amount(value: float, unit: str) -> str:
    """`12,345 documents`; bytes in powers of 1024: `1.5 MiB`."""
    if unit != "bytes":
        return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.3g} {unit}"
    for name in _BINARY_UNITS:
        if value < 1024 or name == _BINARY_UNITS[-1]:
            break
        value /= 1024
    return f"{value:,.0f} {name}" if name == "B" else f"{value:,.1f} {name}"


def loss_terms(metrics: Iterable[str]) -> list[str]:
    """Of the names of a step's metrics, those of single terms' losses; none if there is one term alone.

    A loss that others are a part of, as `pairs/loss` of `pairs/masked_token/loss`, is no single term's.
    """
    losses = [name for name in metrics if name.endswith(_LOSS)]
    wholes = {whole for name in losses for whole in losses if _is_part_of(name, whole)}
    terms = [name for name in losses if name not in wholes]
    return terms if len(terms) > 1 else []


def _is_part_of(loss: str, whole: str) -> bool:
    return loss != whole and loss.startswith(whole.removesuffix("loss"))


def step_line(metrics: dict[str, float | int]) -> str:
    """The metrics of a training step, its loss among them, in one line; missing ones are omitted."""
    formats = (
        ("loss", "loss {:.4f}"),
        ("lr", "lr {:.1e}"),
        ("grad_norm", "grad norm {:.2f}"),
        ("tokens_per_s", "{:,.0f} tok/s"),
    )
    texts = [text.format(metrics[name]) for name, text in formats if name in metrics]
    if terms := loss_terms(metrics):
        shown = ", ".join(f"{name.removesuffix(_LOSS)} {metrics[name]:.4g}" for name in terms)
        texts[0] += f" ({shown})"
    if "step_s" in metrics:
        step_s = metrics["step_s"]
        texts.append(f"{step_s:.1f} s/step" if step_s >= 1 else f"{step_s:.2g} s/step")
    for name, text in (("skipped_steps", "skipped"), ("steps_without_targets", "without targets")):
        if metrics.get(name):
            texts.append(f"{metrics[name]:,.0f} steps {text}")
    return " | ".join(texts)
