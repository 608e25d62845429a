# SPDX-License-Identifier: Apache-2.0
"""`audit` as a run: measured into a run folder, resumable, with a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keelwright.core.config import config_from_mapping, config_to_mapping, require_in_range
from keelwright.core.digests import file_digest
from keelwright.core.errors import ConfigError, ModelMismatchError, UnsafeInputError
from keelwright.core.files import require_new_folder
from keelwright.core.protocols import Progress, Silent
from keelwright.heal.exam import suite_for
from keelwright.heal.parties import ModelLike, Party, check_weights, open_party
from keelwright.heal.reporting import ensure_report, write_report
from keelwright.measure.audit import audit as measure_models
from keelwright.measure.suites import items_within
from keelwright.measure.utility import TextUtility, Utility, load_utility
from keelwright.models.chat import template_digest
from keelwright.models.loading import find_device, load
from keelwright.models.memory import available_bytes, require_memory, shown_bytes
from keelwright.models.refs import parse_ref
from keelwright.models.threads import threads_for
from keelwright.report.text import number, percent
from keelwright.runs.folder import RunFolder, RunSpec, default_run_folder
from keelwright.runs.places import require_place

_FLAG = "--out"
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
    max_new_tokens: int | None = None
    """Longest answer in tokens; None means what the suite asks for."""
    batch_size: int = 64
    """Answers generated at once."""
    seed: int = 0
    """Kept for the record; an audit is greedy and draws nothing."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    offline: bool = False
    """Never ask the hub."""
    allow_pickle: bool = False
    """Also open pickled weights, as tensors only."""

    def __post_init__(self) -> None:
        require_in_range("batch_size", self.batch_size, low=1)
        if self.limit is not None:
            require_in_range("limit", self.limit, low=1)


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
    find_device(config.device)
    parties = {"model": _open("model", model, config)}
    if against is not None:
        parties["against"] = _open("against", against, config)
    suite = suite_for(parties["model"].ref, config.suite)
    utility = load_utility(config.utility) if config.utility is not None else None
    _require_comparable(parties, utility)
    require_memory(max(party.total_bytes for party in parties.values()), "This audit")
    folder = Path(run) if run is not None else default_run_folder("audit")
    require_place(folder, flag=_FLAG)
    plan = _plan(parties, suite.name, len(items_within(suite.items(), config.limit)), folder)
    if not (folder / "run.json").is_file():
        require_new_folder(folder, flag=_FLAG)
        progress.plan("keelwright audit", plan)
        check_weights(parties.values(), progress)
    with RunFolder.open(folder, _spec(parties, config), flag=_FLAG) as keeper:
        done = keeper.finished()
        if done is not None:
            progress.note(f"'{folder}' is finished already; this is its result")
            ensure_report(folder)
            return done
        if keeper.resumed:
            progress.plan("keelwright audit, resumed", plan)
        with threads_for(parties["model"].parameters):
            result = measure_models(
                parties["model"].ref,
                suite=suite,
                against=parties["against"].ref if against is not None else None,
                sink=keeper,
                utility=utility,
                limit=config.limit,
                max_new_tokens=config.max_new_tokens,
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


def _require_comparable(parties: Mapping[str, Party], utility: Utility | None) -> None:
    """Raise for what would only come to light when everything has been measured."""
    if "against" not in parties:
        if isinstance(utility, TextUtility):
            raise ConfigError(
                "The perplexity of a text is measured against another model.",
                expected="--against MODEL, or a task file",
                found=f"the text '{utility.name}' alone",
                fix="name the model that this one came from with --against",
            )
        return
    sides = (parties["against"], parties["model"])
    digests = [template_digest(party.tokenizer()) for party in sides]
    if digests[0] != digests[1]:
        raise ModelMismatchError(
            "The two models have different chat templates: their answers are not to the same questions.",
            expected=f"template {digests[0]}, as in {sides[0].ref.text}",
            found=f"template {digests[1]} in {sides[1].ref.text}",
            fix="copy chat_template.jinja and tokenizer_config.json from one to the other, or audit each on its own",
        )


def _open(role: str, model: ModelLike, config: AuditConfig) -> Party:
    """Open a model by its headers; pickled weights have none, so they are loaded, where that is allowed."""
    try:
        return open_party(role, model, offline=config.offline)
    except UnsafeInputError:
        if not config.allow_pickle:
            raise
        loaded = load(parse_ref(model), device=config.device, offline=config.offline, allow_pickle=True)
        return open_party(role, loaded, offline=config.offline)


def _spec(parties: Mapping[str, Party], config: AuditConfig) -> RunSpec:
    inputs = {role: {"ref": party.ref.text, "digest": party.digest} for role, party in parties.items()}
    if config.utility is not None:
        path = Path(config.utility)
        inputs["utility"] = {"ref": config.utility, "digest": file_digest(path) if path.is_file() else config.utility}
    words = ["keelwright", "audit", parties["model"].ref.text, "--suite", config.suite]
    if "against" in parties:
        words += ["--against", parties["against"].ref.text]
    for name in ("utility", "limit", "max_new_tokens"):
        if getattr(config, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    if config.allow_pickle:
        words.append("--allow-pickle")
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
    parts = [f"{words} {percent(value)}" for words, value in known]
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
            f"a change of {number(100 * first['minimum_detectable_change'])} points in the {_NOUNS[first['metric']]}."
        )
    return f"{summary['model']}: {', '.join(parts)}.{tail}"
