"""The memory that a prefix cache may take where no limit is set."""

from __future__ import annotations

from pathlib import Path

import torch

_SHARE = 8  # of the free memory, one part in this many
_CGROUP = Path("/sys/fs/cgroup")


def default_bytes(device: torch.device) -> int:
    """Returns an eighth of the memory that is free now on a device; for the CPU within the limit of its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // _SHARE
    return min(_free_on_machine(), _free_in_container()) // _SHARE


def _free_on_machine() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _free_in_container(folder: Path = _CGROUP) -> int:
    """Returns the memory that the control group (version 2) leaves; more than any machine has without a limit."""
    try:
        limit, used = ((folder / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        return max(int(limit) - int(used), 0)
    except (OSError, ValueError):  # no such file, or `max`
        return 2**62
