# SPDX-License-Identifier: Apache-2.0
"""What can be done with a finished run without its model: written for other programs, or judged again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keelwright.core.config import config_from_mapping, config_to_mapping, require_choice
from keelwright.core.decoding import DecodingConfig
from keelwright.core.digests import file_digest
from keelwright.core.errors import ConfigError, DataError
from keelwright.core.protocols import Progress, Silent
from keelwright.core.records import Generation, Item, Record
from keelwright.heal.audit_words import models_of, sentence
from keelwright.heal.reporting import ensure_report, write_report
from keelwright.measure.audit import OpenEngine, examine
from keelwright.measure.audit_config import AuditConfig
from keelwright.measure.ordering import hosts_of, items_digest, ordered_parts, suite_name
from keelwright.measure.part import Part
from keelwright.measure.utility import TaskUtility, load_utility
from keelwright.runs.folder import ReadRun, RunFolder, RunSpec, default_run_folder, read_run, unfinished
from keelwright.runs.places import require_place

FORMATS: Final = ("inspect", "parquet")
_FLAG: Final = "--out"
_HERE: Final = ("judge_url", "cache", "offline", "data", "batch_size")
"""Settings of where and how fast, which judging again may choose anew."""


def export(run: str | Path, *, to: str, out: str | Path) -> list[Path]:
    """Write the records of a run for another program.

    Args:
        run: A run folder.
        to: `inspect`: logs of Inspect, one per model (a file that ends in `.eval` for a run of one model, else a
            folder); `parquet`: one flat table.
        out: Where to; nothing may be there.

    Returns:
        The files that were written.

    Raises:
        KeelwrightError: It is no run folder, has no records, or something is there already.
    """
    require_choice("to", to, FORMATS)
    if to == "inspect":
        from keelwright.runs.interop.inspect_export import write_inspect_log

        return write_inspect_log(Path(run), Path(out))
    from keelwright.runs.interop.parquet import write_parquet

    return [write_parquet(Path(run), Path(out))]


def judge_again(
    run: str | Path,
    *,
    judges: Sequence[str],
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Judge the answers of an audit again, and sum them up anew; the model is not needed.

    The result is an audit in a folder of its own: the records with the added verdicts, a fresh summary and page. A
    judge of the same name as one of the suite's takes its place, others come after.

    Args:
        run: A finished audit.
        judges: Judges to ask, as `--judge` of an audit.
        out: Run folder; `runs/<time>-audit` by default. The same call on the same folder resumes.
        progress: Where to tell what is going on.
        settings: Where judges are found: `judge_url`, `cache`, `offline`, `data`, `batch_size`.

    Returns:
        The summary, as `summary.json` holds it.

    Raises:
        ConfigError: A judge is not known, or a setting is not one of these.
        DataError: The run is no finished audit, or its suite reads other items now.
    """
    for name in settings:
        require_choice("setting", name, _HERE)
    progress = progress or Silent()
    old = _audit(Path(run))
    config = _config(old, judges, settings)
    folder = Path(out) if out is not None else default_run_folder("audit")
    require_place(folder, flag=_FLAG)
    parts = _parts(old, config, progress)
    utility = load_utility(config.utility) if config.utility is not None else None
    records = old.records()
    _require_whole(old, records, parts)
    with RunFolder.open(folder, _spec(old, config, judges), flag=_FLAG) as keeper:
        done = keeper.finished()
        if done is not None:
            progress.note(f"'{folder}' is finished already; this is its result")
            ensure_report(folder)
            return done
        progress.plan("keelwright runs judge", _plan(old, parts, folder))
        here = {record.key for record in keeper.records()}
        for record in _replaced(records, parts, judges):
            if record.key not in here:
                keeper.append(record)
        result = examine(
            _opener(old, records, "model"),
            parts,
            against=_opener(old, records, "against") if "against" in old.run["inputs"] else None,
            sink=keeper,
            utility=utility if isinstance(utility, TaskUtility) else None,
            limit=config.limit,
            seed=config.seed,
            progress=progress,
        )
        summary = _with_old({**result.to_summary(), "run": str(folder)}, old, parts)
        summary["models"] = models_of(summary)
        summary["sentence"] = sentence(summary)
        keeper.finish(summary)
    write_report(folder)
    return summary


@dataclass(frozen=True, slots=True)
class RecordedEngine:
    """A model of which only its answers are left; meets `core.protocols.Engine`."""

    name: str
    revision: str
    template_digest: str
    usage: _Usage
    network: str | None = None

    def answer(
        self,
        items: Sequence[Item],
        decoding: DecodingConfig,
        *,
        have: Collection[tuple[str, int]] = (),
        on_batch: Callable[[Sequence[Generation]], None] | None = None,
        progress: Progress = Silent(),  # noqa: B008 - it has no state
    ) -> list[Generation]:
        """Refuse: there is nothing to ask.

        Raises:
            DataError: Always.
        """
        raise _incomplete(self.name, f"{len(items) * decoding.samples - len(have)} answers to be made")


@dataclass(frozen=True, slots=True)
class _Usage:
    """What the answers cost when they were made."""

    kept: Mapping[str, Any]

    def to_mapping(self) -> dict[str, Any]:
        """Return it as it was."""
        return dict(self.kept)


def _audit(folder: Path) -> ReadRun:
    found = read_run(folder)
    if found.run["command"] != "audit":
        raise DataError(
            f"'{folder}' is no audit.",
            expected="a run of audit",
            found=f"a run of {found.run['command']}",
            fix="judge the audits that it was made from",
        )
    if found.summary is None:
        raise unfinished(found)
    return found


def _config(old: ReadRun, judges: Sequence[str], settings: Mapping[str, Any]) -> AuditConfig:
    """Return the audit's settings with the further judges; of two judges of one name the newer counts."""
    if not judges:
        raise ConfigError("No judge was named.", expected="--judge NAME", found="none", fix="name at least one")
    kept = {name: tuple(value) if isinstance(value, list) else value for name, value in old.run["config"].items()}
    by_name = {one.partition(":")[0]: one for one in (*kept["judges"], *judges)}
    changed = {name: value for name, value in settings.items() if value is not None}
    values = {**kept, **changed, "judges": tuple(by_name.values()), "validate_judge": ()}
    return config_from_mapping(AuditConfig, values, where=str(old.path / "run.json"))


def _parts(old: ReadRun, config: AuditConfig, progress: Progress) -> tuple[Part, ...]:
    suite = suite_name(config, str(old.run["inputs"]["model"]["ref"]))
    parts = ordered_parts(config, suite, progress)
    digest, known = items_digest(parts), old.run["inputs"]["items"]["digest"]
    if digest != known:
        raise DataError(
            f"The suite '{suite}' reads other items now than when '{old.path}' was made.",
            expected=f"digests {known}",
            found=digest,
            fix="use the same version and the same data sets, or audit the model again",
        )
    return parts


def _require_whole(old: ReadRun, records: Sequence[Record], parts: Sequence[Part]) -> None:
    """Raise `DataError` where the run lacks an answer, or its remedy would have to ask the model again."""
    present = {record.key for record in records}

    def refuse(items: Sequence[Item]) -> list[str]:
        raise _incomplete(str(old.path), "a remedy that asks the model itself")

    for role in [role for role in ("against", "model") if role in old.run["inputs"]]:
        for part in parts:
            keys = {(role, item.item_id, sample) for item in part.items for sample in range(part.decoding.samples)}
            missing = len(keys - present)
            if missing:
                raise _incomplete(str(old.path), f"{missing} of {len(keys)} answers of '{role}' missing")
            if part.mitigation is not None:
                part.mitigation.rewrite(part.items, refuse)


def _incomplete(name: str, found: str) -> DataError:
    return DataError(
        f"'{name}' does not hold every answer that its suite asks for.",
        expected="an answer of each model to every item, and no remedy that asks the model itself",
        found=found,
        fix="audit the model again, with the judge",
    )


def _replaced(records: Sequence[Record], parts: Sequence[Part], judges: Sequence[str]) -> Iterator[Record]:
    """Yield the records without the verdicts of judges that another of the same name takes the place of."""
    named = {
        judge.judge_id.partition("@")[0]: judge.judge_id
        for part in parts
        for judge, name in zip(part.judges, part.panel, strict=True)
        if name in judges
    }
    for record in records:
        kept = {one: said for one, said in record.judgements.items() if named.get(one.partition("@")[0], one) == one}
        yield record if len(kept) == len(record.judgements) else dataclasses.replace(record, judgements=kept)


def _opener(old: ReadRun, records: Sequence[Record], role: str) -> OpenEngine:
    first = next((record for record in records if record.model_id == role), None)
    if first is None:
        raise DataError(
            f"The run '{old.path}' holds no answers of '{role}'.",
            expected="a record of each model",
            found=f"{len(records)} records",
            fix="audit the model again",
        )
    summary = old.summary or {}
    side = summary["against"] if role == "against" else summary
    usage = _Usage(side.get("usage") or {})
    return lambda: RecordedEngine(str(side["model"]), first.revision, first.template_digest, usage)


def _with_old(summary: dict[str, Any], old: ReadRun, parts: tuple[Part, ...]) -> dict[str, Any]:
    """Add what judging again does not measure: overlaps, and a utility that needs the model itself."""
    before = old.summary or {}
    summary["overlaps"] = before.get("overlaps", [])
    summary["network"] = hosts_of(parts)
    summary["judged_again"] = str(old.path)
    if summary["utility"] is None and before.get("utility") is not None:
        summary["utility"] = before["utility"]
        summary["metrics"]["utility"] = before["metrics"]["utility"]
        if "against" in summary:
            summary["against"]["metrics"]["utility"] = before["against"]["metrics"]["utility"]
    return summary


def _spec(old: ReadRun, config: AuditConfig, judges: Sequence[str]) -> RunSpec:
    words = ["keelwright", "runs", "judge", str(old.path)]
    words += [word for judge in judges for word in ("--judge", judge)]
    kept = {role: value for role, value in old.run["inputs"].items() if not role.startswith("labels ")}
    records = {"ref": str(old.path), "digest": file_digest(old.path / "records.jsonl")}
    return RunSpec("audit", tuple(words), config_to_mapping(config), config.seed, {**kept, "records": records})


def _plan(old: ReadRun, parts: tuple[Part, ...], folder: Path) -> list[tuple[str, str]]:
    rows = [("run", str(old.path))]
    for part in parts:
        rows += [(part.name, f"{len(part.items):,} items"), ("  judges", ", ".join(part.panel))]
    hosts = hosts_of(parts)
    leaves = f"answers go to {', '.join(hosts)}" if hosts else "nothing leaves this machine"
    return [*rows, ("model", "not needed"), ("writes", f"run folder {folder}"), ("network", leaves)]
