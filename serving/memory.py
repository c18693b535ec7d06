"""Memory of this machine, in bytes: what there is, what is free, what a process has resident.

Linux tells all of it, and of a container its own bounds count. Elsewhere nothing is known, which
is None.
"""

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CONTAINER = Path("/sys/fs/cgroup")
KIB = 1024


def total_bytes() -> int | None:
    """Return all that there is, for this container."""
    return _least(_told(MEMINFO, "MemTotal:"), _number(CONTAINER / "memory.max"))


def free_bytes() -> int | None:
    """Return what can be had without anybody's memory being written to a disk."""
    most, used = _number(CONTAINER / "memory.max"), _number(CONTAINER / "memory.current")
    left = None if most is None or used is None else max(most - used, 0)
    return _least(_told(MEMINFO, "MemAvailable:"), left)


def resident_bytes(pid: int) -> int | None:
    """Return what a process has in memory, mapped files included; None where there is none."""
    return _told(Path(f"/proc/{pid}/status"), "VmRSS:")


def _told(path: Path, name: str) -> int | None:
    """Read a line such as "MemTotal:  24000000 kB"."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * KIB for line in lines if line.startswith(name)), None)


def _number(path: Path) -> int | None:
    """Read a file that holds one number; "max" is none."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _least(*given: int | None) -> int | None:
    return min((value for value in given if value is not None), default=None)
