"""Peak memory of this process, or of what torch has allocated on a GPU, in bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device | str = "cpu") -> bool:
    """Begin to measure anew: from now on `peak_bytes` is the most since this moment.

    Returns:
        Whether that is possible: on Linux where the kernel allows it, and on GPUs. Elsewhere the peak stays that of
        the whole life of the process.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5")  # 5 sets the "high water mark" to what is resident now, see proc(5)
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device | str = "cpu") -> int | None:
    """The most bytes held since `reset_peak`, else since the start; None where the system does not say.

    For "cuda" what torch has allocated on that device, without its reserve and the driver's own; otherwise the
    resident memory of the process.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = _status("VmHWM")
    if found is not None or sys.platform == "win32":
        return found
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB, but on macOS bytes


def held_bytes(device: torch.device | str = "cpu") -> int | None:
    """Bytes held now, counted as in `peak_bytes`; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def _status(name: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
