# SPDX-License-Identifier: Apache-2.0
"""`harden`: prepare a model for tuning by others, or tune it with a defence; measured before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keelwright.arena.arms import MORE_ALIGNMENT, UNDEFENDED, Arm, Chosen, MoreAlignment, UserTuning, choose
from keelwright.arena.config import TuningConfig
from keelwright.arena.job import Job, open_job
from keelwright.arena.keeping import Output
from keelwright.arena.results import Ledger, claims
from keelwright.arena.session import FLAG, measured, run_session, spec_of
from keelwright.arena.words import harden_sentence
from keelwright.core.config import config_from_mapping
from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Progress, Silent
from keelwright.data.asking import PLAIN, Asking
from keelwright.data.row_sets import RowSets
from keelwright.runs.folder import default_run_folder
from keelwright.runs.places import require_place
from keelwright.training.config import TrainConfig
from keelwright.training.defence import TuningStage
from keelwright.weights.parties import ModelLike


class NoTuning:
    """Nothing is tuned after hardening."""

    config: Any = None
    config_class = type(None)
    roles: tuple[str, ...] = ()

    def stages(self, rows: RowSets, train: TrainConfig) -> Sequence[TuningStage]:
        """Return no run."""
        return ()

    def asking(self) -> Asking:
        """Return requests as they are."""
        return PLAIN


def harden(
    method: str,
    model: ModelLike,
    *,
    out: str | Path,
    files: Mapping[str, str | Path] | None = None,
    stresses: Sequence[str] = (),
    method_settings: Mapping[str, Mapping[str, Any]] | None = None,
    run: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train a model with a defence, write it, and measure it before and after.

    A defence of the alignment stage trains on refusals (and what else it needs) and prepares the model for tuning by
    others; `stresses` then show, in memory, what tuning does to the hardened model, to the model as it was, and to one
    with as many plain alignment steps. A defence of the tuning stage trains on the user's rows.

    Args:
        method: A method of `harden`.
        model: Any form of a model reference.
        out: Where the hardened model goes: a checkpoint, or an adapter where a LoRA was trained.
        files: Rows by role; lab models need none.
        stresses: Tunings to measure afterwards; only for defences of the alignment stage.
        method_settings: Settings by method.
        run: Run folder; `runs/<time>-harden` by default. The same call on the same folder resumes.
        progress: Where to tell what is going on.
        settings: Fields of `TuningConfig`.

    Returns:
        The summary, as `summary.json` holds it.

    Raises:
        KeelwrightError: What was given is wrong, or the machine lacks something.
    """
    config = config_from_mapping(TuningConfig, settings, where="harden")
    progress = progress or Silent()
    chosen = choose(method, "harden", dict((method_settings or {}).get(method, {})))
    kinds = [choose(name, "stress", dict((method_settings or {}).get(name, {}))) for name in stresses]
    _require_stage(chosen, kinds)
    folder = Path(run) if run is not None else default_run_folder("harden")
    require_place(folder, flag=FLAG)
    job = open_job(model, files or {}, config, progress)
    main = Arm(chosen.name, _own_tuning(chosen), _own_name(chosen), chosen.method)
    rows = job.rows_of(config.seed)
    for role in dict.fromkeys([*main.stress.roles, *chosen.method.roles]):
        rows.require(role, who=f"The defence '{chosen.name}'")
    plan = job.plan(_planned(job, chosen, kinds, rows, out), folder)
    words = [chosen.name, job.party.ref.text, "--out", str(out)]
    words += [word for one in kinds for word in ("--stress", one.name)]
    spec = spec_of("harden", job, words, {"method": [chosen], "stresses": kinds}, files or {}, out=str(out))

    def work(ledger: Ledger) -> Mapping[str, Any]:
        output = Output(Path(out), ledger.bench.model, job.party, chosen.method.asking())
        ledger.start(chosen.method.asking(), main.stress_name)
        ledger.cell(main, config.seed, at_end=output.write)
        _resist(ledger, chosen, kinds)
        return _found(ledger, main, chosen, kinds, output)

    return run_session(spec, job, folder, plan, work, progress=progress, out=Path(out))


def _resist(ledger: Ledger, chosen: Chosen, kinds: Sequence[Chosen]) -> None:
    """Put the model under each stress: as it was, with more plain alignment, and hardened."""
    for kind in kinds:
        ledger.start(kind.method.asking(), kind.name)
        for arm in (
            Arm(UNDEFENDED, kind.method, kind.name),
            Arm(MORE_ALIGNMENT, kind.method, kind.name, MoreAlignment()),
            Arm(chosen.name, kind.method, kind.name, chosen.method),
        ):
            for seed in ledger.job.seeds:
                ledger.cell(arm, seed)


def _require_stage(chosen: Chosen, kinds: Sequence[Chosen]) -> None:
    if kinds and chosen.method.stage == "tuning":
        raise ConfigError(
            f"'{chosen.name}' acts within a tuning run, so there is nothing to put under stress afterwards.",
            expected="a defence of the alignment stage with --stress",
            found=f"{chosen.name}, of the tuning stage",
            fix=f"use `keelwright stress {kinds[0].name} MODEL --defence {chosen.name}`",
        )


def _own_tuning(chosen: Chosen) -> Any:
    return UserTuning() if chosen.method.stage == "tuning" else NoTuning()


def _own_name(chosen: Chosen) -> str:
    return "tuning" if chosen.method.stage == "tuning" else "hardening"


def _planned(
    job: Job, chosen: Chosen, kinds: Sequence[Chosen], rows: RowSets, out: str | Path
) -> list[tuple[str, str]]:
    config = job.config
    if chosen.method.stage == "tuning":
        train = job.tuning(config.seed)(len(rows.user))
        told = f"{len(rows.user):,} of the user's rows, {train.steps:,} steps with {chosen.label}"
    else:
        train = job.hardening(config.seed)
        told = f"{train.steps:,} steps of {train.batch_size} rows with {chosen.label}"
    stressed = [("stress", f"{kind.label}, {len(job.seeds)} seeds, three arms, in memory") for kind in kinds]
    return [("training", told), *stressed, ("output", f"written to {out}")]


def _found(ledger: Ledger, main: Arm, chosen: Chosen, kinds: Sequence[Chosen], output: Output) -> dict[str, Any]:
    job = ledger.job
    own = main.stress_name
    changes = ledger.changes(ledger.first(own), ledger.last(chosen.name, own, job.config.seed))
    for kind in kinds:
        for seed in job.seeds:
            before, after = (ledger.last(name, kind.name, seed) for name in (UNDEFENDED, chosen.name))
            changes += ledger.changes(before, after)
    summary: dict[str, Any] = {
        **measured(ledger),
        "method": chosen.label,
        "defence": chosen.label,
        "stress": ", ".join(one.label for one in kinds) or None,
        "protocol": ledger.bench.meter.protocol(ledger.bench.model, output.asking).to_mapping(),
        "changes": changes,
        "claims": claims(ledger.rows),
        "gate": None,
        "notes": output.notes(),
        "model_out": str(output.folder),
    }
    return {**summary, "sentence": harden_sentence(summary)}
