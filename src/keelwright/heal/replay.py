# SPDX-License-Identifier: Apache-2.0
"""Do a run again from its own `run.json`, and say whether the result is the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keelwright.core.errors import DataError
from keelwright.core.protocols import Progress
from keelwright.heal.audit import audit
from keelwright.heal.demo import demo
from keelwright.heal.loop import heal
from keelwright.runs.folder import read_run, unfinished

_FREE = ("run", "out", "seconds", "reproduce", "written")
"""What may differ between a run and its replay: places and times."""


def replay(folder: Path, *, out: Path, progress: Progress) -> dict[str, Any]:
    """Repeat a run in a new folder and compare the two results.

    Args:
        folder: The run to repeat.
        out: Folder of the replay; a repaired model goes to `out/repaired`.
        progress: Where to tell what is going on.

    Returns:
        `{"same", "differing", "says", "run"}`; `differing` names the keys of the summary.

    Raises:
        DataError: The run is unfinished, or its command cannot be repeated.
    """
    known = read_run(folder)
    if known.summary is None:
        raise unfinished(known)
    again = json.loads(json.dumps(_again(known.run, out, progress)))
    differing = [key for key in known.summary if key not in _FREE and known.summary[key] != again.get(key)]
    says = f"same result as {folder}" if not differing else f"differs from {folder} in {', '.join(differing)}"
    return {"same": not differing, "differing": differing, "says": says, "run": str(out)}


def _again(run: Mapping[str, Any], out: Path, progress: Progress) -> dict[str, Any]:
    inputs = run["inputs"]
    config: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in run["config"].items()
    }
    if run["command"] == "demo":
        return demo(out=out, seed=run["seed"], device=config["device"], progress=progress)
    config.pop("out", None)
    if run["command"] == "heal":
        return heal(
            inputs["aligned"]["ref"],
            inputs["tuned"]["ref"],
            out=out / "repaired",
            run=out / "run",
            progress=progress,
            **config,
        )
    if run["command"] == "audit":
        against = inputs["against"]["ref"] if "against" in inputs else None
        return audit(inputs["model"]["ref"], against=against, run=out, progress=progress, **config)
    raise DataError(
        f"A run of '{run['command']}' cannot be replayed.",
        expected="a run of demo, heal or audit",
        found=str(run["command"]),
        fix="repeat its command by hand",
    )
