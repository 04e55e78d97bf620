"""What a run measures, as JSON lines: one object per line, each with a "step".

JSON has no word for numbers that are not finite. They are written as the texts "NaN", "Infinity" and "-Infinity" (as
the JSON form of protocol buffers does), so that every line is valid JSON; `read_metrics` gives floats back.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from loopwise.io.atomic import write_text

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Metrics:
    """Appends lines to a file, each flushed to the operating system before `append` returns.

    A line that an earlier process left unfinished is cut off when the file is opened.

    Args:
        path: the file; made, with its folder, if absent.

    Raises:
        ValueError: the file cannot be opened, or `append` cannot write: what is wrong with the disk, in one line.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)
        except OSError as error:
            raise ValueError(f"cannot open metrics file {self.path}: {error.strerror}") from error
        self._file.truncate(_whole_length(self.path))

    def append(self, *, step: int, **values: Any) -> None:
        """Add a line: JSON values, or scalars with an `item()` (arrays and tensors of one element)."""
        text = json.dumps(_plain({"step": step} | values), ensure_ascii=False, allow_nan=False)
        data, start = (text + "\n").encode(), self._file.seek(0, os.SEEK_END)
        try:
            # A full disk may take a part of the line without an error; only the next call is refused.
            written = 0
            while written < len(data):
                written += self._file.write(data[written:]) or 0
        except OSError as error:
            self._file.truncate(start)
            raise ValueError(
                f"cannot write metrics file {self.path}: {error.strerror}; free space and resume"
            ) from error

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after `step`, which a resumed run writes anew; the file is replaced in one go."""
        kept = [line for line in _lines(self.path) if json.loads(line)["step"] <= step]
        self._file.close()
        write_text(self.path, "".join(line + "\n" for line in kept))
        self._file = open(self.path, "a+b", buffering=0)

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        self._file.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Lines of a metrics file in the order written; an unfinished last line is left out.

    Raises:
        ValueError: no such file, or a line that is no JSON object with an integer "step"; its number is named.
    """
    return [_rich(json.loads(line)) for line in _lines(Path(path))]


def _lines(path: Path) -> list[str]:
    """Whole lines, checked."""
    try:
        data = path.read_bytes()
        text = data[: data.rfind(b"\n") + 1].decode("utf-8")
    except OSError as error:
        raise ValueError(f"cannot read metrics file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no metrics file: {error}") from error
    # str.splitlines would also split at separators that a text inside a line may hold
    lines = text.split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            holds = isinstance(json.loads(line)["step"], int)
        except (ValueError, TypeError, KeyError):
            holds = False
        if not holds:
            raise ValueError(f'{path}:{number} is no JSON object with an integer "step": {line[:60]!r}')
    return lines


def _whole_length(path: Path) -> int:
    """Number of bytes up to the end of the last whole line."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 4096)
            file.seek(start)
            cut = file.read(end - start).rfind(b"\n")
            if cut >= 0:
                return start + cut + 1
            end = start
    return 0


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not isinstance(value, bool | int | float | str | None) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _rich(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rich(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rich(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
