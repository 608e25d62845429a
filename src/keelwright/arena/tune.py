# SPDX-License-Identifier: Apache-2.0
"""`tune`: everyday tuning that keeps its safety in view: audit, tune with or without a defence, audit, gate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from keelwright.arena.arms import Arm, Chosen, UserTuning, choose
from keelwright.arena.checking import require_trainable
from keelwright.arena.config import TuningConfig
from keelwright.arena.job import open_job
from keelwright.arena.keeping import Output
from keelwright.arena.memory import require_training_memory
from keelwright.arena.results import Ledger
from keelwright.arena.session import FLAG, measured, run_session, spec_of
from keelwright.arena.words import tune_sentence
from keelwright.core.config import config_from_mapping, config_to_mapping
from keelwright.core.digests import json_digest
from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Progress, Silent
from keelwright.data.asking import PLAIN
from keelwright.measure.gate import decide
from keelwright.measure.policy import Policy, read_policy
from keelwright.runs.folder import default_run_folder
from keelwright.runs.places import require_place
from keelwright.weights.parties import ModelLike

TUNING: Final = "tuning"
"""What stands in the place of a stress: the user's own tuning."""


def tune(
    model: ModelLike,
    *,
    data: str | Path,
    out: str | Path,
    defence: str | None = None,
    files: Mapping[str, str | Path] | None = None,
    method_settings: Mapping[str, Mapping[str, Any]] | None = None,
    policy: str | Path = "default",
    run: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Tune a model on the user's rows and say what it cost in safety.

    The model is audited before and after, on the same items, and a policy decides. The tuned model is written whatever
    the verdict: the exit code tells, and the page explains.

    Args:
        model: Any form of a model reference.
        data: JSON-lines file of the user's rows.
        out: Where the tuned model goes: a checkpoint, or an adapter where a LoRA was trained.
        defence: A method of `harden` of the tuning stage; None tunes plainly.
        files: Rows of other roles, as the defence needs them; lab models need none.
        method_settings: Settings of the defence, by its name.
        policy: YAML file of the gate, or `default`.
        run: Run folder; `runs/<time>-tune` by default. The same call on the same folder resumes.
        progress: Where to tell what is going on.
        settings: Fields of `TuningConfig`.

    Returns:
        The summary, as `summary.json` holds it; `gate.outcome` is the verdict.

    Raises:
        KeelwrightError: What was given is wrong, or the machine lacks something.
    """
    config = config_from_mapping(TuningConfig, settings, where="tune")
    progress = progress or Silent()
    chosen = _defence(defence, method_settings or {})
    rules = read_policy(policy)
    folder = Path(run) if run is not None else default_run_folder("tune")
    require_place(folder, flag=FLAG)
    job = open_job(model, {**(files or {}), "user": data}, config, progress)
    name = "tuned" if chosen is None else chosen.name
    arm = Arm(name, UserTuning(), TUNING, None if chosen is None else chosen.method, chosen.label if chosen else "")
    rows = job.rows_of(config.seed)
    require_trainable([arm], job)
    steps = job.tuning(config.seed)(len(rows.user)).steps
    training = ("training", f"{len(rows.user):,} rows, {steps:,} steps, {chosen.label if chosen else 'no defence'}")
    memory = require_training_memory(job, [arm])
    plan = job.plan([training, memory, ("gate", rules.name), ("output", f"written to {out}")], folder)
    words = [job.party.ref.text, "--out", str(out), *(["--defence", chosen.name] if chosen else [])]
    words += [] if str(policy) == "default" else ["--policy", str(policy)]
    methods = {"defences": [chosen] if chosen else []}
    given = {**(files or {}), "user": data}
    digest = json_digest(config_to_mapping(rules))
    spec = spec_of("tune", job, words, methods, given, out=str(out), policy=digest)

    def work(ledger: Ledger) -> Mapping[str, Any]:
        asking = PLAIN if arm.defence is None else arm.defence.asking()
        ledger.start(asking, TUNING)
        output = Output(Path(out), ledger.bench.model, job.stored_dtype, asking, ledger.mark)
        ledger.cell(arm, config.seed, at_end=output.write)
        return _found(ledger, arm, chosen, rules, output)

    return run_session(spec, job, folder, plan, work, progress=progress, out=Path(out))


def _defence(name: str | None, settings: Mapping[str, Mapping[str, Any]]) -> Chosen | None:
    if name is None:
        return None
    chosen = choose(name, "harden", dict(settings.get(name, {})))
    if chosen.method.stage != "tuning":
        raise ConfigError(
            f"'{name}' prepares a model before it is tuned; it is no part of a tuning run.",
            expected="a defence of the tuning stage",
            found=f"{name}, of the {chosen.method.stage} stage",
            fix=f"first `keelwright harden {name} MODEL --out HARDENED`, then tune HARDENED",
        )
    return chosen


def _found(ledger: Ledger, arm: Arm, chosen: Chosen | None, policy: Policy, output: Output) -> dict[str, Any]:
    start, end = ledger.first(TUNING), ledger.last(arm.name, TUNING, ledger.job.config.seed)
    verdict = decide(policy, ledger.records(end), ledger.records(start), primary=ledger.job.primary)
    rules = [one.to_mapping() for one in verdict.rules]
    summary: dict[str, Any] = {
        **measured(ledger),
        "method": chosen.label if chosen is not None else "plain tuning",
        "defence": chosen.label if chosen is not None else None,
        "stress": None,
        "protocol": ledger.bench.meter.protocol(ledger.bench.model, output.asking).to_mapping(),
        "changes": ledger.changes(start, end),
        "claims": [],
        "gate": {"outcome": verdict.outcome, "policy": policy.name, "rules": rules},
        "outcome": verdict.outcome,
        "notes": output.notes(),
        "model_out": str(output.folder),
    }
    return {**summary, "sentence": tune_sentence(summary)}
