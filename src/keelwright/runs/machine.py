# SPDX-License-Identifier: Apache-2.0
"""What a run was made on: versions and machine, read without importing the libraries."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = ("keelwright", "torch", "transformers", "tokenizers", "safetensors", "accelerate", "peft", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that can change a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Return platform, processors, memory in bytes and torch threads asked for; no host name, no user, no path."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "torch_threads": os.environ.get("OMP_NUM_THREADS", "default"),
    }


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
