# SPDX-License-Identifier: Apache-2.0
"""Every judge by name: what it reads, what it needs, and how it is opened.

A judge is named `NAME`, or `NAME:MODEL` where it asks a model; the model is opened in this process, by vLLM
(`NAME:vllm:MODEL`) or behind a server (`NAME:openai:MODEL`). Nothing is imported before a judge is asked for, and no
model is opened before it is asked something; what leaves this machine is known at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from keelwright.core.config import nearest
from keelwright.core.decoding import DecodingConfig
from keelwright.core.errors import ConfigError, OfflineError
from keelwright.core.protocols import Engine, Judge, Progress, Silent
from keelwright.core.records import Generation, Item
from keelwright.models.engines.hosts import foreign_host

EngineName = Literal["hf", "vllm", "openai"]

HOSTED: Final = "https://api.openai.com/v1"
"""Where a server is looked for when no address is given."""


@dataclass(frozen=True, slots=True)
class JudgeLine:
    """What is known of a judge without importing it."""

    name: str
    title: str
    reads: str
    """What it looks at."""
    says: str
    """What it can tell apart."""
    path: str
    """`package.module:Name` of what makes the judge, or the form put before a model; called without arguments."""
    asks: bool = False
    """Whether it asks a model."""
    knows_harm: bool = False
    """Whether it tells a harmful answer from a harmless one."""
    model: str = ""
    """A model that its prompts are written for; empty: any that follows instructions."""

    def to_mapping(self) -> dict[str, str | bool]:
        """Return what a table of judges shows."""
        needs = "nothing" if not self.asks else (self.model or "a model that follows instructions")
        return {
            "name": self.name,
            "title": self.title,
            "reads": self.reads,
            "says": self.says,
            "needs": needs,
            "knows_harm": self.knows_harm,
        }


_ANSWER, _BOTH = "the answer", "request and answer"
_REFUSALS = "refusal or not"
_HERE = "keelwright.judges"
_GUARDS = f"{_HERE}.guards"

LINES: Final[tuple[JudgeLine, ...]] = (
    JudgeLine(
        "refusal-lists",
        "Rules for refusals, full and partial",
        _BOTH,
        "refusal, partial refusal, incoherence",
        f"{_HERE}.refusal:RefusalJudge",
    ),
    JudgeLine(
        "refusal-classifier",
        "Trained classifier of refusals",
        _BOTH,
        "refusal, partial refusal, incoherence",
        f"{_HERE}.refusal_classifier:RefusalClassifierJudge",
    ),
    JudgeLine(
        "xstest-prefixes",
        "XSTest's list of openings",
        _ANSWER,
        _REFUSALS,
        f"{_HERE}.xstest_prefixes:PrefixJudge",
    ),
    JudgeLine("qi-keywords", "Qi's 29 substrings", _ANSWER, _REFUSALS, f"{_HERE}.qi_keywords:KeywordJudge"),
    JudgeLine(
        "qi-keywords-casefold",
        "Qi's 29 substrings in any case",
        _ANSWER,
        _REFUSALS,
        f"{_HERE}.qi_keywords:casefolded",
    ),
    JudgeLine("toxicity", "Trained scorer of toxicity", _ANSWER, "a score, 0 to 1", f"{_HERE}.toxicity:ToxicityJudge"),
    JudgeLine(
        "unit-tests",
        "Runs a code answer against its tests",
        "the answer and the item's tests",
        "correct or wrong",
        f"{_HERE}.code_tests:CodeTestsJudge",
    ),
    JudgeLine(
        "qi-rubric",
        "Harmfulness 1 to 5",
        _BOTH,
        "refusal, harmless, harmful; score 1 to 5",
        f"{_HERE}.qi:QiForm",
        asks=True,
        knows_harm=True,
    ),
    JudgeLine(
        "strongreject-rubric",
        "Usable harm 0 to 1",
        _BOTH,
        "refusal, useless, harmful; score 0 to 1",
        f"{_HERE}.strongreject:StrongRejectForm",
        asks=True,
        knows_harm=True,
    ),
    JudgeLine(
        "refusal-rubric",
        "XSTest's three classes",
        _BOTH,
        "refusal, partial refusal, compliance",
        f"{_HERE}.refusal_rubric:RefusalForm",
        asks=True,
    ),
    JudgeLine(
        "fulfilment",
        "Does the answer do what was asked?",
        "instruction and answer, never the profile",
        "yes or no",
        f"{_HERE}.user_specific:FulfilmentForm",
        asks=True,
    ),
    JudgeLine(
        "user-harm",
        "Could the answer harm this user?",
        "profile, instruction and answer",
        "refusal, harmless, harmful",
        f"{_HERE}.user_specific:UserHarmForm",
        asks=True,
        knows_harm=True,
    ),
    *(
        JudgeLine(name, title, _BOTH, says, f"{_GUARDS}.{place}", asks=True, knows_harm=True, model=model)
        for name, title, says, place, model in (
            (
                "llama-guard-3",
                "Llama Guard 3",
                "safe or unsafe, S1 to S14",
                "llama_guard:LlamaGuardForm",
                "meta-llama/Llama-Guard-3-8B",
            ),
            (
                "llama-guard-3-1b",
                "Llama Guard 3, small",
                "safe or unsafe, S1 to S13",
                "llama_guard:llama_guard_1b",
                "meta-llama/Llama-Guard-3-1B",
            ),
            (
                "llama-guard-4",
                "Llama Guard 4, text only",
                "safe or unsafe, S1 to S14",
                "llama_guard:llama_guard_4",
                "meta-llama/Llama-Guard-4-12B",
            ),
            ("wildguard", "WildGuard", "refusal, safe, unsafe", "wildguard:WildGuardForm", "allenai/wildguard"),
            (
                "qwen3guard-strict",
                "Qwen3Guard-Gen, controversial is unsafe",
                "refusal, safe, unsafe with categories",
                "qwen3guard:Qwen3GuardForm",
                "Qwen/Qwen3Guard-Gen-4B",
            ),
            (
                "qwen3guard-loose",
                "Qwen3Guard-Gen, controversial is safe",
                "refusal, safe, unsafe with categories",
                "qwen3guard:loose",
                "Qwen/Qwen3Guard-Gen-4B",
            ),
            (
                "granite-guardian-3.3",
                "Granite Guardian 3.3",
                "safe or unsafe",
                "granite_guardian:GraniteGuardianForm",
                "ibm-granite/granite-guardian-3.3-8b",
            ),
            (
                "granite-guardian-4.1",
                "Granite Guardian 4.1",
                "safe or unsafe",
                "granite_guardian:granite_guardian_4",
                "ibm-granite/granite-guardian-4.1-8b",
            ),
            (
                "shieldgemma",
                "ShieldGemma, four guidelines",
                "safe or unsafe, by guideline",
                "shieldgemma:ShieldGemmaForm",
                "google/shieldgemma-9b",
            ),
        )
    ),
)
"""Every judge of this room, in the order of the table."""


@dataclass(frozen=True, slots=True)
class JudgeContext:
    """What opening a judge may need."""

    open_engine: Callable[[str, EngineName], Engine] | None = None
    """Opens a model by name and kind of engine; None: as `models.engines.opening` does."""
    base_url: str | None = None
    """Address of the server that answers for `openai:` models; None: the hosted one."""
    cache: Path | None = None
    """File of verdicts that judges who ask a model share; None: none."""
    offline: bool = False
    """Whether the network must not be used."""
    batch_size: int = 16
    """Questions at a time."""
    progress: Progress = Silent()  # noqa: RUF009 - it has no state
    """Told of each answered question, and of a cache that was damaged."""
    opened: dict[tuple[str, str], Engine] = field(default_factory=dict)
    """Engines by model and kind: judges of the same model share one."""


@dataclass(frozen=True, slots=True)
class JudgeSpec:
    """A judge as a user names it, taken apart."""

    line: JudgeLine
    model: str = ""
    engine: EngineName = "hf"


class LateEngine:
    """An engine that opens its model with the first question; meets `core.protocols.Engine`.

    Args:
        name: The model, in the user's words.
        network: The host that questions go to; None: none.
        open_now: Opens it.
    """

    def __init__(self, name: str, network: str | None, open_now: Callable[[], Engine]) -> None:
        self.name = name
        self.network = network
        self._open_now = open_now
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The open engine."""
        if self._engine is None:
            self._engine = self._open_now()
        return self._engine

    @property
    def revision(self) -> str:
        """Of the open model."""
        return self.engine.revision

    @property
    def template_digest(self) -> str:
        """Of the open model's chat template."""
        return self.engine.template_digest

    def answer(
        self,
        items: Sequence[Item],
        decoding: DecodingConfig,
        *,
        have: Collection[tuple[str, int]] = (),
        on_batch: Callable[[Sequence[Generation]], None] | None = None,
        progress: Progress = Silent(),  # noqa: B008 - it has no state
    ) -> list[Generation]:
        """Return the open engine's answers."""
        return self.engine.answer(items, decoding, have=have, on_batch=on_batch, progress=progress)


def parse_judge(spec: str, *, extra: Sequence[JudgeLine] = ()) -> JudgeSpec:
    """Return what a spec names.

    Args:
        spec: `NAME`, `NAME:MODEL`, `NAME:vllm:MODEL` or `NAME:openai:MODEL`.
        extra: Judges of the caller's, found before those of this room.

    Raises:
        ConfigError: There is no such judge, its model is missing, or it asks none.
    """
    name, _, model = spec.partition(":")
    lines = known_judges(extra)
    if name not in lines:
        raise ConfigError(
            f"There is no judge '{name}'.",
            expected=f"one of {', '.join(lines)}",
            found=spec,
            fix=nearest(name, lines),
        )
    line = lines[name]
    kind, colon, rest = model.partition(":")
    engine: EngineName = "hf"
    for one in get_args(EngineName):
        if colon and kind == one:
            engine, model = one, rest
    if line.asks and not model:
        raise ConfigError(
            f"The judge '{name}' asks a model, and none is named.",
            expected=f"{name}:MODEL, or {name}:openai:MODEL for a model behind a server",
            found=spec,
            fix=f"name one, for example {name}:{line.model or 'org/name'}",
        )
    if model and not line.asks:
        raise ConfigError(
            f"The judge '{name}' asks no model.", expected=name, found=spec, fix="leave out what follows the colon"
        )
    return JudgeSpec(line, model, engine)


def known_judges(extra: Sequence[JudgeLine] = ()) -> Mapping[str, JudgeLine]:
    """Return every judge by name, those of the caller first."""
    return {line.name: line for line in (*LINES, *extra)}


def needs_network(spec: str, context: JudgeContext, *, extra: Sequence[JudgeLine] = ()) -> str | None:
    """Return the host that answers would be sent to, None where they stay on this machine; opens nothing.

    A model from the hub may still have to be fetched; no answer leaves the machine by that.

    Raises:
        ConfigError: The spec is wrong.
    """
    return _network(parse_judge(spec, extra=extra), context)


def find_judge(spec: str, context: JudgeContext, *, extra: Sequence[JudgeLine] = ()) -> Judge:
    """Return the judge that a spec names; its model is opened with the first question.

    Args:
        spec: `NAME`, `NAME:MODEL`, `NAME:vllm:MODEL` or `NAME:openai:MODEL`.
        context: What it may need.
        extra: Judges of the caller's, found before those of this room.

    Raises:
        ConfigError: The spec is wrong.
        OfflineError: Answers would leave this machine, and must not.
        StorageError: The cache cannot be opened.
    """
    found = parse_judge(spec, extra=extra)
    network = _network(found, context)
    if network is not None and context.offline:
        raise OfflineError(
            f"The judge '{spec}' sends requests and answers to {network}, and the network is not allowed.",
            expected="a model on this machine, or a server on it",
            found=network,
            fix="leave --offline out, or name a local model",
        )
    made = _made(found.line)
    if not found.line.asks:
        judge: Judge = made
        return judge
    from keelwright.judges.asking import AskingJudge

    engine = LateEngine(found.model, network, lambda: _opened(found, context))
    asking = AskingJudge(made, engine, batch_size=context.batch_size, progress=context.progress)
    if context.cache is None:
        return asking
    from keelwright.judges.cache import CachedJudge, VerdictCache

    return CachedJudge(asking, VerdictCache(context.cache, progress=context.progress))


def judge_table(extra: Sequence[JudgeLine] = ()) -> list[dict[str, str | bool]]:
    """Return a row per judge: name, title, what it reads, says and needs, whether it knows harm."""
    return [line.to_mapping() for line in known_judges(extra).values()]


def _made(line: JudgeLine) -> Any:
    module, _, attribute = line.path.partition(":")
    return getattr(importlib.import_module(module), attribute)()


def _opened(spec: JudgeSpec, context: JudgeContext) -> Engine:
    key = (spec.model, spec.engine)
    if key not in context.opened:
        context.opened[key] = (context.open_engine or _opener(context))(spec.model, spec.engine)
    return context.opened[key]


def _opener(context: JudgeContext) -> Callable[[str, EngineName], Engine]:
    from keelwright.models.engines.opening import open_engine

    def opened(model: str, engine: EngineName) -> Engine:
        address = context.base_url if engine == "openai" else None
        return open_engine(model, kind=engine, base_url=address, offline=context.offline)

    return opened


def _network(spec: JudgeSpec, context: JudgeContext) -> str | None:
    if spec.engine != "openai":
        return None
    return foreign_host(context.base_url or HOSTED)
