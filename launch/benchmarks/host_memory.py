"""What the process holds in host memory, from Linux's /proc/self."""

from __future__ import annotations

from pathlib import Path


def reset_peak() -> int:
    """Forget the largest host memory so far; return what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return held()


def held() -> int:
    """Bytes that are held now."""
    return _status("VmRSS")


def peak() -> int:
    """The most that was held since :func:`reset_peak`, in bytes."""
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
