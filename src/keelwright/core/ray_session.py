# SPDX-License-Identifier: Apache-2.0
"""Ray, where it is asked for: the cluster that `RAY_ADDRESS` names, or one of this machine while it is needed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from keelwright.core.errors import MissingError


@contextlib.contextmanager
def ray_session(workers: int) -> Iterator[Any]:
    """Give the module `ray`, connected; what was begun here ends with the block.

    Args:
        workers: Processors of a cluster that is begun on this machine.

    Raises:
        MissingError: Ray is not installed.
    """
    ray = _ray()
    began_here = not ray.is_initialized()
    if began_here:
        address = os.environ.get("RAY_ADDRESS")
        limit: dict[str, Any] = {} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, configure_logging=False, **limit)
    try:
        yield ray
    finally:
        if began_here:
            ray.shutdown()


def _ray() -> Any:
    with contextlib.suppress(ImportError):
        import ray

        return ray
    raise MissingError(
        "Ray is not installed.",
        expected="the package ray, for --executor ray",
        found="nothing of that name",
        fix="pip install 'keelwright[ray]', or leave --executor out",
    )
