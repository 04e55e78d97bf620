"""Numbers for people."""

from __future__ import annotations


def amount(value: float, unit: str = "") -> str:
    """Three significant digits and a decimal prefix: 134515008 -> `135 M`."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:#.3g}".rstrip(".") + f" {prefix}{unit}"
    return f"{value:.4g} {unit}".rstrip()


def duration(seconds: float) -> str:
    """The two largest units: `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    seconds = round(seconds)
    for size, name, small, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = seconds % size // small
            return f"{seconds // size} {name}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds} s"
