# SPDX-License-Identifier: Apache-2.0
"""Judges held against people's labels: those of an audit, or judges alone without any model to audit.

The rates of an audit are corrected where a condition of the labels is one of its models: `model` or `after`, `against`
or `before`; labels of one condition speak of the audited model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from keelwright.core.config import config_from_mapping, config_to_mapping
from keelwright.core.digests import file_digest
from keelwright.core.errors import ConfigError, DataError
from keelwright.core.protocols import Judge, Progress, Silent
from keelwright.core.records import Kind, Record
from keelwright.heal.reporting import ensure_report, write_report
from keelwright.measure.audit import AuditResult
from keelwright.measure.audit_config import AuditConfig
from keelwright.measure.labels import POSITIVE, Labelled, Scale, needs_records, read_labels, said_of, scale_of
from keelwright.measure.metrics import EXCLUDED_LABELS, RULES
from keelwright.measure.panel import panel_of
from keelwright.measure.part import Part
from keelwright.measure.validate import Validation, validate_judge
from keelwright.report.text import number
from keelwright.runs.folder import RunFolder, RunSpec, default_run_folder
from keelwright.runs.places import require_place

DEFAULT_JUDGE: Final = "refusal-lists"
_FLAG: Final = "--out"
_ROLES: Final[Mapping[str, str]] = {"model": "model", "after": "model", "against": "against", "before": "against"}
"""By condition of the labels, in any case: the side of the audit that it speaks of."""
_CORRECTED: Final[Mapping[tuple[str, str | None], str]] = {
    ("refusal", "harmful"): "refusal_rate",
    ("refusal", "contrast"): "over_refusal",
    ("harm", "harmful"): "harm_rate",
    ("score", "harmful"): "harm_rate",
}
"""By scale of the labels and kind of the audit's items: the rate that is corrected."""


def validate_judges(
    labels: Sequence[str | Path],
    *,
    run: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Hold judges against people's labels, without a model to audit.

    Args:
        labels: Files of labels that hold the answers, see `measure.labels`.
        run: Run folder; `runs/<time>-validate` by default.
        progress: Where to tell what is going on.
        settings: Fields of `AuditConfig`; `judges` are those in question, `refusal-lists` by default.

    Returns:
        The summary, as `summary.json` holds it; `validation` has one entry per judge.

    Raises:
        KeelwrightError: A file or a judge is wrong, or the machine lacks something.
    """
    files = tuple(str(one) for one in labels)
    config = config_from_mapping(AuditConfig, {**settings, "validate_judge": files}, where="validate")
    progress = progress or Silent()
    folder = Path(run) if run is not None else default_run_folder("validate")
    require_place(folder, flag=_FLAG)
    require_labels(files, has_records=False)
    labelled = _read(files, ())
    scale = scale_of(labelled)
    find = panel_of(config, progress)
    judges = [find(name) for name in config.judges or (DEFAULT_JUDGE,)]
    network = [host for host in dict.fromkeys(getattr(judge, "network", None) for judge in judges) if host]
    with RunFolder.open(folder, _spec(config), flag=_FLAG) as keeper:
        done = keeper.finished()
        if done is not None:
            progress.note(f"'{folder}' is finished already; this is its result")
            ensure_report(folder)
            return done
        progress.plan("keelwright audit --validate-judge", _plan(config, labelled, network, folder))
        found = _validations(labelled, scale, judges, {}, config.seed, progress)
        summary = {
            "schema": 1,
            "command": "validate",
            "run": str(folder),
            "sentence": " ".join(sentence_of(one) for one in found),
            "scale": scale,
            "validation": found,
            "network": network,
        }
        keeper.finish(summary)
    write_report(folder)
    return summary


def require_labels(files: Sequence[str], *, has_records: bool) -> None:
    """Raise for what is wrong with files of labels, before anything is loaded.

    Args:
        files: The files.
        has_records: Whether an audit will give the answers that a file only names.

    Raises:
        MissingError: There is no such file.
        DataError: A row is malformed, or the labels are of no one scale.
        ConfigError: A file names answers by id only and there is no audit to give them.
    """
    with_answers: list[Labelled] = []
    for file in files:
        if not needs_records(file):
            with_answers += read_labels(file)
        elif not has_records:
            raise ConfigError(
                f"'{file}' names answers without holding them.",
                expected="columns 'prompt' and 'answer' (or output, response, completion)",
                found="rows with an item_id only",
                fix="name the model that gave the answers, or write them into the file",
            )
    if with_answers:
        scale_of(with_answers)


def validate_audit(
    result: AuditResult, parts: Sequence[Part], files: Sequence[str], *, seed: int, progress: Progress
) -> list[dict[str, Any]]:
    """Return how far the judges of an audit can be trusted, with the rates that people would have found.

    Args:
        result: What the audit found.
        parts: What was asked.
        files: Files of labels.
        seed: Of the bootstraps.
        progress: Told of a stage per judge.

    Returns:
        A mapping per judge, see `measure.validate.Validation.to_mapping`; `metric` names the rate that is corrected.
    """
    sides: dict[str, Sequence[Record]] = {"model": result.records}
    if result.against is not None:
        sides["against"] = result.against.records
    labelled = _read(files, [record for records in sides.values() for record in records])
    scale = scale_of(labelled)
    judges = {judge.judge_id: judge for part in parts if part.headline for judge in part.judges}
    kind = _kind_of(result.primary)
    audits = {
        judge_id: _positives(labelled, judge_id, scale, sides, kind) if kind is not None else {} for judge_id in judges
    }
    found = _validations(labelled, scale, list(judges.values()), audits, seed, progress, lenient=True)
    return [{**one, "metric": _CORRECTED.get((scale, kind))} for one in found]


def sentence_of(validation: Mapping[str, Any]) -> str:
    """Return what became of one judge in one sentence."""
    kappas = [
        f"{number(one['kappa']['value'])} on {one['condition']}" for one in validation["conditions"] if one["kappa"]
    ]
    agreed = f"kappa {', '.join(kappas)}" if kappas else "kappa is not defined on these labels"
    tail = "; it errs differently between conditions, so paired comparisons by it are biased"
    return f"{validation['judge']}: {agreed}{tail if validation['is_biased'] else ''}."


def label_inputs(files: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return files of labels as inputs of a run."""
    return {
        f"labels {number}": {"ref": file, "digest": file_digest(Path(file))} for number, file in enumerate(files, 1)
    }


def _read(files: Sequence[str], records: Sequence[Record]) -> list[Labelled]:
    return [one for file in files for one in read_labels(file, records=records)]


def _validations(
    labelled: Sequence[Labelled],
    scale: Scale,
    judges: Sequence[Judge],
    audits: Mapping[str, Mapping[str, Sequence[bool]]],
    seed: int,
    progress: Progress,
    *,
    lenient: bool = False,
) -> list[dict[str, Any]]:
    """Return a mapping per judge; `lenient` tells of a judge that cannot read these answers instead of raising."""
    found: list[Validation] = []
    for judge in judges:
        progress.stage(f"holding {judge.judge_id} against {len(labelled):,} labels")
        try:
            one = validate_judge(labelled, judge, scale=scale, audits=audits.get(judge.judge_id), seed=seed)
        except DataError as error:
            if not lenient:
                raise
            # A finished audit is not lost because one of its judges knows nothing but its own suite.
            one = Validation(judge.judge_id, scale, (), {}, (), (f"Not held against the labels. {error.problem}",))
        found.append(one)
    return [one.to_mapping() for one in found]


def _positives(
    labelled: Sequence[Labelled], judge_id: str, scale: Scale, sides: Mapping[str, Sequence[Record]], kind: Kind
) -> dict[str, list[bool]]:
    """Return the judge's positives on the audit, by condition of the labels."""
    conditions = list(dict.fromkeys(one.condition for one in labelled))
    found: dict[str, list[bool]] = {}
    for condition in conditions:
        side = "model" if len(conditions) == 1 else _ROLES.get(condition.strip().lower(), "")
        said = [
            said_of(opinion, scale)
            for record in sides.get(side, ())
            if record.kind == kind and record.sample == 0 and (opinion := record.judgements.get(judge_id)) is not None
            if opinion.label not in EXCLUDED_LABELS
        ]
        if said:
            found[condition] = [one in POSITIVE[scale] for one in said]
    return found


def _kind_of(primary: str) -> Kind | None:
    """Return the kind of items that the deciding rate counts, where it is a rate of refusals or of harm."""
    return RULES[primary].kinds[0] if primary in {"harm_rate", "refusal_rate", "over_refusal"} else None


def _spec(config: AuditConfig) -> RunSpec:
    words = ["keelwright", "audit"]
    words += [word for file in config.validate_judge for word in ("--validate-judge", file)]
    words += [word for judge in config.judges for word in ("--judge", judge)]
    return RunSpec(
        "validate", tuple(words), config_to_mapping(config), config.seed, label_inputs(config.validate_judge)
    )


def _plan(
    config: AuditConfig, labelled: Sequence[Labelled], network: Sequence[str], folder: Path
) -> list[tuple[str, str]]:
    counts: dict[str, int] = {}
    for one in labelled:
        counts[one.condition] = counts.get(one.condition, 0) + 1
    rows = [("labels", file) for file in config.validate_judge]
    rows += [("  condition", f"{name}: {count:,} labels") for name, count in counts.items()]
    rows += [("judge", name) for name in config.judges or (DEFAULT_JUDGE,)]
    leaves = f"answers go to {', '.join(network)}" if network else "nothing leaves this machine"
    return [*rows, ("writes", f"run folder {folder}"), ("network", leaves)]
