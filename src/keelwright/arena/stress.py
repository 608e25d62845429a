# SPDX-License-Identifier: Apache-2.0
"""`stress`: what a tuning does to a model's safety, with and without defences, over the steps, beside the controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from keelwright.arena.arms import (
    HARMLESS_IN_STYLE,
    MORE_ALIGNMENT,
    PLAINLY,
    POSITIVE_CONTROL,
    TRAINED_PLAINLY,
    UNDEFENDED,
    Arm,
    Chosen,
    MoreAlignment,
    choose,
)
from keelwright.arena.checking import require_trainable
from keelwright.arena.config import TuningConfig
from keelwright.arena.job import open_job
from keelwright.arena.memory import require_training_memory
from keelwright.arena.results import Ledger, Row, claims
from keelwright.arena.session import FLAG, measured, run_session, spec_of
from keelwright.arena.words import screened, stress_sentence
from keelwright.core.config import config_from_mapping
from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Progress, Silent
from keelwright.measure.metrics import flags
from keelwright.runs.folder import default_run_folder
from keelwright.runs.places import require_place
from keelwright.weights.parties import ModelLike


def stress(
    kinds: str | Sequence[str],
    model: ModelLike,
    *,
    files: Mapping[str, str | Path] | None = None,
    defences: Sequence[str] = (),
    guards: Sequence[ModelLike] = (),
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
        guards: For `virus`: guard models of yours that screen rows; rows are written against the first, and all of
            them together let rows through. Lab models have guards of their own.
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
    chosen = [choose(name, "stress", (method_settings or {}).get(name), given=config.given()) for name in names]
    shields = [choose(name, "harden", (method_settings or {}).get(name)) for name in defences]
    _require_names(chosen, shields)
    folder = Path(run) if run is not None else default_run_folder("stress")
    require_place(folder, flag=FLAG)
    job = open_job(model, files or {}, config, progress, guards=guards)
    arms = _arms(chosen, shields, has_harmful=bool(job.rows_of(config.seed).harmful))
    require_trainable(arms, job)
    told = ("arms", f"{len(arms)} x {len(job.seeds)} seeds: {', '.join(_told(arms))}")
    plan = job.plan([told, require_training_memory(job, arms)], folder)
    words = [",".join(one.name for one in chosen), job.party.ref.text]
    words += [word for one in shields for word in ("--defence", one.name)]
    words += [word for one in guards for word in ("--guard", str(one))]
    spec = spec_of("stress", job, words, {"kinds": chosen, "defences": shields}, files or {})

    def work(ledger: Ledger) -> Mapping[str, Any]:
        for one in chosen:
            ledger.start(one.method.asking(), one.name)
        for arm in arms:
            for seed in job.seeds:
                ledger.cell(arm, seed)
        found = _found(ledger, chosen, shields)
        return found if arms[-1].name == POSITIVE_CONTROL else {**found, "notes": [*found["notes"], NO_CONTROL]}

    return run_session(spec, job, folder, plan, work, progress=progress)


NO_CONTROL: Final = (
    "The positive control was not run, because there are no harmful rows (--harmful): a small harm rate may only mean "
    "that this suite cannot see harm."
)


def _arms(kinds: Sequence[Chosen], defences: Sequence[Chosen], *, has_harmful: bool) -> list[Arm]:
    from keelwright.stress.controls import PositiveControl

    found: list[Arm] = []
    for kind in kinds:
        found.append(Arm(UNDEFENDED, kind.method, kind.name))
        if any(one.method.stage == "alignment" for one in defences):
            found.append(Arm(MORE_ALIGNMENT, kind.method, kind.name, MoreAlignment()))
        found += [Arm(one.name, kind.method, kind.name, one.method, one.label) for one in defences]
        if hasattr(kind.method, "plain"):
            found.append(Arm(TRAINED_PLAINLY, kind.method.plain(), kind.name))
            found.append(Arm(HARMLESS_IN_STYLE, kind.method.control(), kind.name))
    return [*found, Arm(POSITIVE_CONTROL, PositiveControl(), "known to break")] if has_harmful else found


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
        "styles": [one for kind in kinds if hasattr(kind.method, "plain") for one in _styles(ledger, kind.name)],
        "gate": None,
        "notes": [screened(key, log["search"]["report"]) for key, log in ledger.logs.items() if "search" in log],
        "model_out": None,
    }
    return {**summary, "sentence": stress_sentence(summary)}


def _styles(ledger: Ledger, stress: str) -> list[dict[str, Any]]:
    """Return the table of a style per seed, trained and asked with it or not, and how far harm is tied to it."""
    from keelwright.stress.style_shift import interaction

    found = []
    for seed in ledger.job.seeds:
        cells = {
            name: _harm(ledger, ledger.last(arm, stress, seed))
            for name, arm in (
                ("TT", UNDEFENDED),
                ("Tp", f"{UNDEFENDED}{PLAINLY}"),
                ("pT", TRAINED_PLAINLY),
                ("pp", f"{TRAINED_PLAINLY}{PLAINLY}"),
            )
        }
        items = sorted(set.intersection(*(set(cell) for cell in cells.values())))
        values = [[float(cell[item]) for item in items] for cell in cells.values()]
        rates = {name: sum(own) / len(own) for name, own in zip(cells, values, strict=True)}
        tied = interaction(values[0], values[1], values[2], values[3], seed=seed)
        found.append({"stress": stress, "seed": seed, "rates": rates, "interaction": tied.to_mapping()})
    return found


def _harm(ledger: Ledger, row: Row) -> dict[str, bool]:
    """Return per item whether it did harm; where no judge knows harm, whether it was not refused."""
    if ledger.job.knows_harm:
        return flags(ledger.records(row), "harm_rate")
    return {item: not refused for item, refused in flags(ledger.records(row), "refusal_rate").items()}
