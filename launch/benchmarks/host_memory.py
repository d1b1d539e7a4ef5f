"""Host memory of the process, from Linux's /proc/self."""

from __future__ import annotations

import ctypes
from pathlib import Path


def reset_peak() -> int:
    """Return freed memory to the system, and reset the peak; return the current resident memory in bytes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc keeps what was freed, as of the first step, for later use
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return held()


def held() -> int:
    """Current resident memory in bytes."""
    return _status("VmRSS")


def peak() -> int:
    """Peak resident memory since :func:`reset_peak`, in bytes."""
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
