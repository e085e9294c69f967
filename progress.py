"""What a person sees while a run works: numbers with their units, durations, and the nearest name to a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def format_value(value: float | None, unit: str = "") -> str:
    """A metric with its unit: 12.3 min, 0.123, 45.6 % (a share in [0, 1] whose unit is "%"); – for None."""
    if value is None:
        return "–"
    if unit == "%":
        return f"{100 * value:.1f} %"
    return f"{value:.1f} {unit}" if unit else f"{value:.3f}"


def format_duration(seconds: float) -> str:
    """45 s, 9 min 8 s, 2 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The hint after an unknown name: the nearest known one, or all of them where none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known)
    if near:
        swapped = [one for one in near if sorted(one) == sorted(name)]  # "gpro" means grpo, not gspo
        return f"did you mean {(swapped or near)[0]!r}?"
    return f"choose from {', '.join(known)}" if known else "there is none"
