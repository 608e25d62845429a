# SPDX-License-Identifier: Apache-2.0
"""`stress`: what a tuning does to a model's safety, with and without defences, over the steps, beside the controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keelwright.arena.arms import MORE_ALIGNMENT, POSITIVE_CONTROL, UNDEFENDED, Arm, Chosen, MoreAlignment, choose
from keelwright.arena.config import TuningConfig
from keelwright.arena.job import Job, open_job
from keelwright.arena.results import Ledger, claims
from keelwright.arena.session import FLAG, measured, run_session, spec_of
from keelwright.arena.words import stress_sentence
from keelwright.core.config import config_from_mapping
from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Progress, Silent
from keelwright.runs.folder import default_run_folder
from keelwright.runs.places import require_place
from keelwright.weights.parties import ModelLike


def stress(
    kinds: str | Sequence[str],
    model: ModelLike,
    *,
    files: Mapping[str, str | Path] | None = None,
    defences: Sequence[str] = (),
    method_settings: Mapping[str, Mapping[str, Any]] | None = None,
    run: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Tune a model in ways that may break its safety, in memory, and measure it over the steps.

    The model itself is never changed and no weights are written. The positive control, a tuning that is known to
    break safety, is always run beside, so that a small figure can be believed.

    Args:
        kinds: One stress or several (see `keelwright methods --room stress`).
        model: Any form of a model reference.
        files: Rows by role; lab models need none.
        defences: Methods of `harden` to compare with the model as it is.
        method_settings: Settings by method, of stresses and defences.
        run: Run folder; `runs/<time>-stress` by default. The same call on the same folder resumes.
        progress: Where to tell what is going on.
        settings: Fields of `TuningConfig`.

    Returns:
        The summary, as `summary.json` holds it.

    Raises:
        KeelwrightError: What was given is wrong, or the machine lacks something.
    """
    config = config_from_mapping(TuningConfig, settings, where="stress")
    progress = progress or Silent()
    names = [kinds] if isinstance(kinds, str) else list(kinds)
    chosen = [choose(name, "stress", dict((method_settings or {}).get(name, {}))) for name in names]
    guards = [choose(name, "harden", dict((method_settings or {}).get(name, {}))) for name in defences]
    _require_names(chosen, guards)
    folder = Path(run) if run is not None else default_run_folder("stress")
    require_place(folder, flag=FLAG)
    job = open_job(model, files or {}, config, progress)
    arms = _arms(chosen, guards)
    _require_rows(arms, job)
    plan = job.plan([("arms", f"{len(arms)} x {len(job.seeds)} seeds: {', '.join(_told(arms))}")], folder)
    words = [",".join(one.name for one in chosen), job.party.ref.text]
    words += [word for one in guards for word in ("--defence", one.name)]
    spec = spec_of("stress", job, words, {"kinds": chosen, "defences": guards}, files or {})

    def work(ledger: Ledger) -> Mapping[str, Any]:
        for one in chosen:
            ledger.start(one.method.asking(), one.name)
        for arm in arms:
            for seed in job.seeds:
                ledger.cell(arm, seed)
        return _found(ledger, chosen, guards)

    return run_session(spec, job, folder, plan, work, progress=progress)


def _arms(kinds: Sequence[Chosen], defences: Sequence[Chosen]) -> list[Arm]:
    from keelwright.stress.controls import PositiveControl

    found = []
    for kind in kinds:
        found.append(Arm(UNDEFENDED, kind.method, kind.name))
        if any(one.method.stage == "alignment" for one in defences):
            found.append(Arm(MORE_ALIGNMENT, kind.method, kind.name, MoreAlignment()))
        found += [Arm(one.name, kind.method, kind.name, one.method) for one in defences]
    found.append(Arm(POSITIVE_CONTROL, PositiveControl(), "known to break"))
    return found


def _require_names(kinds: Sequence[Chosen], defences: Sequence[Chosen]) -> None:
    names = [one.name for one in (*kinds, *defences)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if not kinds or repeated:
        raise ConfigError(
            "A method was named twice." if repeated else "No stress was named.",
            expected="each stress and each defence once",
            found=", ".join(repeated) or "none",
            fix="compare settings of one method in runs of their own, and join them with `keelwright arena table`",
        )


def _require_rows(arms: Sequence[Arm], job: Job) -> None:
    """Raise `DataError` where a method lacks rows, before anything is loaded."""
    rows = job.rows_of(job.config.seed)
    for arm in arms:
        needed = [*arm.stress.roles, *(arm.defence.roles if arm.defence is not None else ())]
        for role in needed:
            if role != "user" or "user" in arm.stress.roles:
                who = f"'{arm.stress_name}'" if role in arm.stress.roles else f"The defence '{arm.name}'"
                rows.require(role, who=who)


def _told(arms: Sequence[Arm]) -> list[str]:
    return [arm.name if arm.name == POSITIVE_CONTROL else f"{arm.stress_name}, {arm.name}" for arm in arms]


def _found(ledger: Ledger, kinds: Sequence[Chosen], defences: Sequence[Chosen]) -> dict[str, Any]:
    changes = []
    for seed in ledger.job.seeds:
        for kind in kinds:
            undefended = ledger.last(UNDEFENDED, kind.name, seed)
            changes += ledger.changes(ledger.first(kind.name), undefended)
            for one in defences:
                changes += ledger.changes(undefended, ledger.last(one.name, kind.name, seed))
    names = ", ".join(one.label for one in kinds)
    summary: dict[str, Any] = {
        **measured(ledger),
        "method": names,
        "defence": ", ".join(one.label for one in defences) or None,
        "stress": names,
        "protocol": ledger.bench.meter.protocol(ledger.bench.model, kinds[0].method.asking()).to_mapping(),
        "changes": changes,
        "claims": claims(ledger.rows),
        "gate": None,
        "notes": [],
        "model_out": None,
    }
    return {**summary, "sentence": stress_sentence(summary)}
