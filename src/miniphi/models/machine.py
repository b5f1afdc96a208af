"""How much memory this machine, or the container around this process, can give. Knows nothing about models."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MachineMemory", "machine_memory"]

# A version 1 control group without a limit reports the largest page-aligned 63-bit number; nothing real is above 2^60.
_NO_LIMIT_BYTES = 1 << 60


@dataclass(frozen=True, kw_only=True)
class MachineMemory:
    """Memory in bytes: what there is, and what a new allocation can use without swapping."""

    total_bytes: int
    available_bytes: int


def machine_memory(root: Path = Path("/")) -> MachineMemory:
    """Measure this machine's memory, capped by the control groups this process is in.

    `root` is where `proc` and `sys` are mounted. Where there is no /proc (macOS), the page counts of sysconf are used,
    and memory that cannot be told free from used counts as available.
    """
    memory = _from_meminfo(root / "proc" / "meminfo") or _from_sysconf()
    for limit, available in _control_group_limits(root):
        memory = MachineMemory(
            total_bytes=min(memory.total_bytes, limit),
            available_bytes=max(0, min(memory.available_bytes, available)),
        )
    return memory


def _from_meminfo(path: Path) -> MachineMemory | None:
    fields = _counters(path, separator=":")
    if "MemTotal" not in fields:
        return None
    free = fields.get("MemAvailable", fields.get("MemFree", 0))
    return MachineMemory(total_bytes=fields["MemTotal"] * 1024, available_bytes=free * 1024)


def _from_sysconf() -> MachineMemory:
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    free = os.sysconf("SC_AVPHYS_PAGES") * page if "SC_AVPHYS_PAGES" in os.sysconf_names else total
    return MachineMemory(total_bytes=total, available_bytes=free)


def _control_group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, still available) in bytes of every control group above this process that has a limit."""
    groups = root / "sys" / "fs" / "cgroup"
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":
            yield from _limits_along(groups, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _limits_along(groups / "memory", path, *names)


def _limits_along(mount: Path, path: str, limit: str, usage: str, reclaimable: str) -> Iterator[tuple[int, int]]:
    relative = Path(path.lstrip("/"))
    # Inside a container the path can be the host's and not exist here: the mount itself then holds the limit.
    for folder in [mount / relative, *(mount / parent for parent in relative.parents)]:
        text = _text(folder / limit).strip()
        if not text.isdigit() or int(text) >= _NO_LIMIT_BYTES:
            continue
        used = _text(folder / usage).strip()
        reclaim = _counters(folder / "memory.stat").get(reclaimable, 0)
        yield int(text), int(text) - (int(used) if used.isdigit() else 0) + reclaim


def _counters(path: Path, separator: str | None = None) -> dict[str, int]:
    counters = {}
    for line in _text(path).splitlines():
        name, *rest = line.split(separator, 1)
        words = rest[0].split() if rest else []
        if words and words[0].isdigit():
            counters[name] = int(words[0])
    return counters


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
