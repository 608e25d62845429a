# SPDX-License-Identifier: Apache-2.0
"""`audit`: a model's safety, or its change from another model, as a run with a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keelwright.core.config import config_from_mapping, config_to_mapping
from keelwright.core.digests import file_digest
from keelwright.core.errors import ConfigError, ModelMismatchError, UnsafeInputError
from keelwright.core.files import require_new_folder
from keelwright.core.protocols import Engine, Progress, Silent
from keelwright.core.records import Item
from keelwright.heal.audit_words import models_of, sentence
from keelwright.heal.reporting import ensure_report, write_report
from keelwright.heal.validation import label_inputs, require_labels, validate_audit
from keelwright.judges.registry import HOSTED
from keelwright.measure.audit import examine
from keelwright.measure.audit_config import AuditConfig
from keelwright.measure.lm_eval_tasks import LmEvalUtility
from keelwright.measure.ordering import items_digest, ordered_parts, suite_name
from keelwright.measure.part import Part
from keelwright.measure.utility import TextUtility, Utility, load_utility
from keelwright.models.chat import template_digest
from keelwright.models.engines.hosts import foreign_host
from keelwright.models.engines.local import LocalEngine
from keelwright.models.engines.opening import open_engine
from keelwright.models.loading import find_device, load
from keelwright.models.memory import available_bytes, require_memory, shown_bytes
from keelwright.models.refs import parse_ref
from keelwright.models.threads import threads_for
from keelwright.runs.folder import RunFolder, RunSpec, default_run_folder
from keelwright.runs.places import require_place
from keelwright.weights.parties import ModelLike, Party, check_weights, open_party

_FLAG = "--out"


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
        model: Any form of a model reference; what the server calls it where the engine is one.
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
    folder = Path(run) if run is not None else default_run_folder("audit")
    require_place(folder, flag=_FLAG)
    task = _prepare(model, against, config, progress)
    plan = _plan(task, folder)
    if not (folder / "run.json").is_file():
        require_new_folder(folder, flag=_FLAG)
        progress.plan("keelwright audit", plan)
        check_weights(task.parties.values(), progress)
    with RunFolder.open(folder, _spec(task), flag=_FLAG) as keeper:
        done = keeper.finished()
        if done is not None:
            progress.note(f"'{folder}' is finished already; this is its result")
            ensure_report(folder)
            return done
        if keeper.resumed:
            progress.plan("keelwright audit, resumed", plan)
        with threads_for(max((party.parameters for party in task.parties.values()), default=0)):
            result = examine(
                task.open("model", progress),
                task.parts,
                against=task.open("against", progress) if "against" in task.refs else None,
                sink=keeper,
                utility=task.utility,
                limit=config.limit,
                seed=config.seed,
                check=config.check_batches,
                progress=progress,
            )
        summary = {**result.to_summary(), "run": str(folder), "overlaps": task.overlaps, "network": task.network}
        summary["models"] = models_of(summary)
        summary["sentence"] = sentence(summary)
        if config.validate_judge:
            summary["validation"] = validate_audit(
                result, task.parts, config.validate_judge, seed=config.seed, progress=progress
            )
        keeper.finish(summary)
    write_report(folder)
    return summary


@dataclass(frozen=True, slots=True)
class _Task:
    """What one audit is about: everything that can be known before a model is loaded."""

    config: AuditConfig
    refs: Mapping[str, str]
    """The models in the user's words, by role."""
    parties: Mapping[str, Party]
    """Those whose weights are on this machine."""
    parts: tuple[Part, ...]
    utility: Utility | None
    overlaps: Sequence[Mapping[str, Any]]
    """Items that two sets share."""

    @property
    def network(self) -> list[str]:
        """Hosts that prompts or answers are sent to."""
        hosts = [getattr(judge, "network", None) for part in self.parts for judge in part.judges]
        if self.config.engine == "openai":
            hosts.insert(0, foreign_host(self.config.base_url or HOSTED))
        return [host for host in dict.fromkeys(hosts) if host]

    def open(self, role: str, progress: Progress) -> Callable[[], Engine]:
        """Return what opens a model when it is its turn."""

        def opened() -> Engine:
            progress.stage(f"loading {self.refs[role]}")
            if self.config.engine != "hf":
                return open_by_config(self.refs[role], self.config)
            party = self.parties[role]
            return LocalEngine(party.load(device=self.config.device, offline=self.config.offline))

        return opened


def open_by_config(name: str, config: AuditConfig) -> Engine:
    """Open a model behind a server, or in vLLM, by the settings of an audit."""
    if config.engine == "vllm":
        return open_engine(name, kind="vllm", offline=config.offline)
    from keelwright.models.engines.openai import OpenAIConfig

    settings = OpenAIConfig(
        api_key_env=config.api_key_env,
        concurrency=config.concurrency,
        requests_per_minute=config.requests_per_minute,
        price_in=config.price_in,
        price_out=config.price_out,
    )
    return open_engine(name, kind="openai", base_url=config.base_url, offline=config.offline, settings=settings)


def _prepare(model: ModelLike, against: ModelLike | None, config: AuditConfig, progress: Progress) -> _Task:
    """Read and check everything but weights: whatever is wrong is said before anything heavy."""
    find_device(config.device)
    named = {"model": model} if against is None else {"model": model, "against": against}
    refs = {role: parse_ref(one).text if config.engine == "hf" else str(one) for role, one in named.items()}
    utility = load_utility(config.utility, offline=config.offline) if config.utility is not None else None
    if isinstance(utility, LmEvalUtility):
        utility.prepare(progress=progress)
    require_labels(config.validate_judge, has_records=True)
    parties = {role: _open(role, one, config) for role, one in named.items()} if config.engine == "hf" else {}
    _require_comparable(parties, utility, has_reference=against is not None)
    parts = ordered_parts(config, suite_name(config, model), progress)
    if parties:
        require_memory(max(party.total_bytes for party in parties.values()), "This audit")
    return _Task(config, refs, parties, parts, utility, overlaps_of(parts))


def overlaps_of(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Return what two sets of the parts share: exact and near duplicates would be counted twice."""
    by_set: dict[str, list[Item]] = {}
    for item in (item for part in parts for item in part.items):
        by_set.setdefault(item.suite, []).append(item)
    if len(by_set) < 2:
        return []
    from keelwright.data.overlap import overlaps

    return [
        {
            "sets": [one.left, one.right],
            "same": len(one.same),
            "near": len(one.near),
            "shares": [one.left_share, one.right_share],
            "says": f"{one.left} and {one.right} share {len(one.same)} items and {len(one.near)} near-duplicates",
        }
        for one in overlaps(by_set)
        if one.left != one.right and (one.same or one.near)
    ]


def _require_comparable(parties: Mapping[str, Party], utility: Utility | None, *, has_reference: bool) -> None:
    """Raise for what would only come to light when everything has been measured."""
    if not has_reference and isinstance(utility, TextUtility):
        raise ConfigError(
            "The perplexity of a text is measured against another model.",
            expected="--against MODEL, or a task file",
            found=f"the text '{utility.name}' alone",
            fix="name the model that this one came from with --against",
        )
    if "against" not in parties:
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


def _spec(task: _Task) -> RunSpec:
    config = task.config
    inputs = {
        role: {"ref": ref, "digest": task.parties[role].digest if role in task.parties else f"{config.engine}: {ref}"}
        for role, ref in task.refs.items()
    }
    for name in ("utility", "suite"):
        value = getattr(config, name)
        if value is not None and Path(value).is_file():
            inputs[name] = {"ref": value, "digest": file_digest(Path(value))}
    inputs |= label_inputs(config.validate_judge)
    inputs["items"] = {"ref": config.suite, "digest": items_digest(task.parts)}
    return RunSpec("audit", _words(task), config_to_mapping(config), config.seed, inputs)


def _words(task: _Task) -> tuple[str, ...]:
    """Return the command that starts the same audit."""
    config, default = task.config, AuditConfig()
    words = ["keelwright", "audit", task.refs["model"], "--suite", config.suite]
    if "against" in task.refs:
        words += ["--against", task.refs["against"]]
    for judge in config.judges:
        words += ["--judge", judge]
    for name in config.__slots__:
        value = getattr(config, name)
        if name in {"suite", "judges"} or value == getattr(default, name):
            continue
        flag = f"--{name.replace('_', '-')}"
        several = value if isinstance(value, tuple) else (value,)
        words += [flag] if value is True else [word for one in several for word in (flag, str(one))]
    return tuple(words)


def _plan(task: _Task, folder: Path) -> list[tuple[str, str]]:
    rows = [
        (role, f"{ref} ({shown_bytes(task.parties[role].total_bytes)})" if role in task.parties else ref)
        for role, ref in task.refs.items()
    ]
    both = "both models" if len(task.refs) > 1 else "the model"
    for part in task.parts:
        answers = len(part.items) * part.decoding.samples
        rows.append((part.name, f"{answers:,} answers of at most {part.decoding.max_new_tokens} tokens from {both}"))
        rows += [
            ("  set", f"{one.title}: {one.n:,} items, {one.licence or 'own items'}") for one in part.sets if one.licence
        ]
        rows.append(("  judges", ", ".join(part.panel)))
    rows += [("overlap", str(one["says"])) for one in task.overlaps]
    if task.parties:
        needed = max(party.total_bytes for party in task.parties.values())
        free = shown_bytes(available_bytes())
        rows.append(("memory", f"{shown_bytes(needed)} and room for activations, of {free} free"))
    leaves = f"prompts and answers go to {', '.join(task.network)}" if task.network else "nothing leaves this machine"
    return [*rows, ("writes", f"run folder {folder}"), ("network", leaves)]
