# SPDX-License-Identifier: Apache-2.0
"""`audit` as a run: measured into a run folder, resumable, with a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keelwright.core.config import config_from_mapping, config_to_mapping, require_in_range
from keelwright.core.digests import file_digest
from keelwright.core.protocols import Progress, Silent
from keelwright.heal.exam import suite_for
from keelwright.heal.parties import ModelLike, Party, open_party
from keelwright.heal.reporting import write_report
from keelwright.measure.audit import audit as measure_models
from keelwright.measure.utility import load_utility
from keelwright.models.memory import available_bytes, shown_bytes
from keelwright.models.threads import threads_for
from keelwright.runs.folder import RunFolder, RunSpec, default_run_folder

_NOUNS = {
    "harm_rate": "harm rate",
    "refusal_rate": "refusal rate",
    "over_refusal": "over-refusal",
    "answer_rate": "ordinary requests answered",
    "incoherent": "incoherent",
}


@dataclass(frozen=True, slots=True)
class AuditConfig:
    """Settings of `audit`."""

    suite: str = "auto"
    """`core`, `workshop` or `auto`: `workshop` for lab models, else `core`."""
    utility: str | None = None
    """Task file, text file (needs `against`) or `lab:` task."""
    limit: int | None = None
    """At most this many items of each kind."""
    batch_size: int = 64
    """Answers generated at once."""
    seed: int = 0
    """Kept for the record; an audit is greedy and draws nothing."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    offline: bool = False
    """Never ask the hub."""

    def __post_init__(self) -> None:
        require_in_range("batch_size", self.batch_size, low=1)


def audit(
    model: ModelLike,
    *,
    against: ModelLike | None = None,
    run: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measure a model's safety, and its change from another model where one is given.

    Args:
        model: Any form of a model reference.
        against: Compare with this model, on the same items.
        run: Run folder; `runs/<time>-audit` by default. The same call on the same folder resumes.
        progress: Where to tell what is going on.
        settings: Fields of `AuditConfig`.

    Returns:
        The summary, as `summary.json` holds it.

    Raises:
        KeelwrightError: What was given is wrong, or the machine lacks something.
    """
    config = config_from_mapping(AuditConfig, settings, where="audit")
    progress = progress or Silent()
    parties = {"model": open_party("model", model, offline=config.offline)}
    if against is not None:
        parties["against"] = open_party("against", against, offline=config.offline)
    suite = suite_for(parties["model"].ref, config.suite)
    utility = load_utility(config.utility) if config.utility is not None else None
    folder = Path(run) if run is not None else default_run_folder("audit")
    with RunFolder.open(folder, _spec(parties, config)) as keeper:
        done = keeper.finished()
        if done is not None:
            progress.note(f"'{folder}' is finished already; this is its result")
            return done
        progress.plan("keelwright audit", _plan(parties, suite.name, len(suite.items()), folder))
        with threads_for(parties["model"].parameters):
            result = measure_models(
                parties["model"].ref,
                suite=suite,
                against=parties["against"].ref if against is not None else None,
                sink=keeper,
                utility=utility,
                limit=config.limit,
                batch_size=config.batch_size,
                device=config.device,
                offline=config.offline,
                progress=progress,
            )
        summary = {**result.to_summary(), "run": str(folder)}
        summary["models"] = _models(summary)
        summary["sentence"] = _sentence(summary)
        keeper.finish(summary)
    write_report(folder)
    return summary


def _spec(parties: Mapping[str, Party], config: AuditConfig) -> RunSpec:
    inputs = {role: {"ref": party.ref.text, "digest": party.digest} for role, party in parties.items()}
    if config.utility is not None:
        path = Path(config.utility)
        inputs["utility"] = {"ref": config.utility, "digest": file_digest(path) if path.is_file() else config.utility}
    words = ["keelwright", "audit", parties["model"].ref.text, "--suite", config.suite]
    if "against" in parties:
        words += ["--against", parties["against"].ref.text]
    for name in ("utility", "limit"):
        if getattr(config, name) is not None:
            words += [f"--{name}", str(getattr(config, name))]
    return RunSpec("audit", tuple(words), config_to_mapping(config), config.seed, inputs)


def _plan(parties: Mapping[str, Party], suite: str, items: int, folder: Path) -> list[tuple[str, str]]:
    rows = [(role, f"{party.ref.text} ({shown_bytes(party.total_bytes)})") for role, party in parties.items()]
    needed = max(party.total_bytes for party in parties.values())
    rows += [
        ("items", f"suite {suite}: {items}, asked of {'both models' if len(parties) > 1 else 'the model'}"),
        ("memory", f"{shown_bytes(needed)} and room for activations, of {shown_bytes(available_bytes())} free"),
        ("writes", f"run folder {folder}"),
        ("network", "nothing leaves this machine"),
    ]
    return rows


def _models(summary: Mapping[str, Any]) -> dict[str, Any]:
    against = summary.get("against")
    columns = {"against": against["metrics"]} if against else {}
    return {**columns, "model": summary["metrics"]}


def _sentence(summary: Mapping[str, Any]) -> str:
    """Return the audit in one sentence: the rates, never the harm rate alone."""
    metrics = summary["metrics"]
    known = [(words, metrics[name]["value"]) for name, words in _NOUNS.items() if metrics[name] is not None]
    parts = [f"{words} {100 * value:.3g}%" for words, value in known]
    changes = [change for change in summary.get("changes", []) if change["verdict"] == "regressed"]
    worse = ", ".join(change["metric"].replace("_", " ") for change in changes)
    if "against" not in summary:
        tail = ""
    elif worse:
        tail = f" Regressed against {summary['against']['model']}: {worse}."
    else:
        first = summary["changes"][0]
        tail = (
            f" No evidence of a regression against {summary['against']['model']}: {first['n']} items would have shown "
            f"a change of {100 * first['minimum_detectable_change']:.3g} points in the {_NOUNS[first['metric']]}."
        )
    return f"{summary['model']}: {', '.join(parts)}.{tail}"
