# SPDX-License-Identifier: Apache-2.0
"""How much memory is left, and the error for a plan that does not fit."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from keelwright.core.errors import ResourceError

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Return the bytes that can still be allocated on the device, within the container's limit."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return min([int(psutil.virtual_memory().available), *_container_rest()])


def require_memory(needed: int, what: str, *, device: torch.device | str = "cpu") -> None:
    """Raise `ResourceError` when `needed` bytes are not available.

    Args:
        needed: Bytes.
        what: What they are for, as the subject of a sentence: `Loading 'org/name'`.
        device: Where.
    """
    rest = available_bytes(device)
    if needed > rest:
        raise ResourceError(
            f"{what} needs more memory than there is.",
            expected=f"{shown_bytes(needed)} free on {torch.device(device).type}",
            found=f"{shown_bytes(rest)} free",
            fix="close other programs, choose a machine with more memory, or a smaller model",
        )


def shown_bytes(count: int) -> str:
    """Return a number of bytes with three significant digits: `2.20 GB`, in powers of 1000."""
    for size, unit in ((1_000_000_000_000, "TB"), (1_000_000_000, "GB"), (1_000_000, "MB"), (1_000, "kB")):
        if count >= size:
            value = count / size
            return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"
    return f"{count} B"


def _container_rest() -> list[int]:
    """Return what the control group leaves, or nothing where there is none."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return []
        used = int((_CGROUP / "memory.current").read_text())
        # Cache of files is given back under pressure.
        rows = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return [max(0, int(limit) - used + int(rows.get("inactive_file", 0)))]
    except (OSError, ValueError):
        return []
