# SPDX-License-Identifier: Apache-2.0
"""The HTTP engine: a model behind any OpenAI-compatible server (vLLM, SGLang, llama.cpp, Ollama, hosted ones).

Items are asked through `/v1/chat/completions`, or `/v1/completions` where the decoding says that prompts are complete
as they stand. Each sample is a request of its own with its own seed. A bounded number of requests is on its way at a
time; which order the replies come in decides nothing.

An item whose attempts all failed has a generation with `finish="error"`. It is handed over once a later answer shows
that the server was still there: when none comes, the run stops instead, and asks such items again when it resumes.
An answer that a filter of the server withheld, or a prompt that it turned down, is no output of the model: it also has
`finish="error"`, with an empty output and never half an answer, and is counted in `usage.failures["blocked"]`.

Source: OpenAI API reference; vLLM, "OpenAI-Compatible Server".

Limits: the server holds the chat template and counts the tokens (many count the end token too, which the engine in this
process does not). Seeds are sent, yet few servers promise the same sample again. A vLLM server fills what a request
leaves open from the model's own `generation_config.json` (a repetition penalty, for instance): start it with
`--generation-config vllm` for neutral decoding. It also writes a BOS before prompts of `/v1/completions`; where prompts
spell theirs out, send `extra_body={"add_special_tokens": False}`. Thoughts that a server splits off from an answer are
no part of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from keelwright.core.config import require_in_range
from keelwright.core.decoding import DecodingConfig
from keelwright.core.digests import json_digest
from keelwright.core.errors import ConfigError, KeelwrightError, OfflineError
from keelwright.core.protocols import Progress, Silent
from keelwright.core.records import Generation, Item
from keelwright.models.engines.background import stream
from keelwright.models.engines.exchange import Exchange, Line, Refused, Unanswered, require_http_library
from keelwright.models.engines.failures import Outcome, Outcomes, fatal, unknown_model
from keelwright.models.engines.hosts import is_this_machine
from keelwright.models.engines.pacing import Pacer
from keelwright.models.engines.replies import Answer, Why, read_answer, read_models
from keelwright.models.engines.usage import Tally, Usage
from keelwright.models.engines.wanted import wanted_answers

_BYTES_PER_TOKEN = 3
"""A cautious guess before the server has counted."""
_HIDDEN_FROM = 8
"""Shorter prompts are not cut out of the server's words: they would be found in any text."""
_LIMITS = ("max_tokens", "max_completion_tokens")
_OURS = frozenset({"model", "messages", "prompt", "temperature", "top_p", "seed", "n", "stream", *_LIMITS})


@dataclass(frozen=True, slots=True)
class OpenAIConfig:
    """How a server is asked."""

    base_url: str = "https://api.openai.com/v1"
    """Address up to and including `/v1`, which is added where the address has no path."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; not set, or an empty name: no key is sent."""
    concurrency: int = 8
    """Requests on their way at a time, at most."""
    timeout_s: float = 300.0
    """Seconds for one attempt, from connecting to the last byte."""
    retries: int = 5
    """Attempts after the first."""
    backoff_s: float = 1.0
    """Longest wait before the second attempt, in seconds; doubles with each, up to a minute."""
    requests_per_minute: float | None = None
    """Attempts per minute, evenly spread; None is no limit."""
    tokens_per_minute: float | None = None
    """Tokens read and written per minute; None is no limit. Before a reply the longest answer is assumed."""
    price_in: float | None = None
    """Price of a million tokens read, in any currency."""
    price_out: float | None = None
    """Price of a million tokens written, in the same currency."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of every request, for servers that know more than the API; part of the template's digest."""

    def __post_init__(self) -> None:
        require_in_range("concurrency", self.concurrency, low=1)
        require_in_range("timeout_s", self.timeout_s, low=0.0, low_open=True)
        require_in_range("retries", self.retries, low=0)
        require_in_range("backoff_s", self.backoff_s, low=0.0)
        for name in ("requests_per_minute", "tokens_per_minute"):
            if getattr(self, name) is not None:
                require_in_range(name, getattr(self, name), low=0.0, low_open=True)
        for name in ("price_in", "price_out"):
            if getattr(self, name) is not None:
                require_in_range(name, getattr(self, name), low=0.0)
        taken = sorted(_OURS & set(self.extra_body))
        if taken:
            raise ConfigError(
                "'extra_body' repeats what the decoding or the engine decides.",
                expected="other fields than " + ", ".join(sorted(_OURS)),
                found=", ".join(taken),
                fix="set it in the decoding",
            )
        _address(self.base_url)


class OpenAIEngine:
    """A model behind a server; meets `core.protocols.Engine`.

    Args:
        model: What the server calls the model.
        config: How the server is asked.
        offline: Ask only a server on this machine.

    Raises:
        OfflineError: The server is elsewhere, and the network is not allowed.
        MissingError: The HTTP client library is not installed.
        ConfigError: The key cannot be sent as it is.
    """

    def __init__(self, model: str, config: OpenAIConfig | None = None, *, offline: bool = False) -> None:
        self.config = config or OpenAIConfig()
        self.name = model
        self._url, host, self._is_local = _address(self.config.base_url)
        self.network: str | None = None if self._is_local else host
        if offline and not self._is_local:
            raise OfflineError(
                f"The model '{model}' is behind the server {host}, and the network is not allowed.",
                expected="a server on this machine (localhost)",
                found=host,
                fix="leave --offline out to send prompts there, or start the server here",
            )
        require_http_library()
        self._key()
        self._pacer = Pacer(
            requests_per_minute=self.config.requests_per_minute, tokens_per_minute=self.config.tokens_per_minute
        )
        self._tally = Tally()
        self._limit = _LIMITS[0]
        self._revision: str | None = None
        self._is_listed = True

    def __repr__(self) -> str:
        return f"OpenAIEngine({self.name!r}, {self._url!r})"

    @property
    def template_digest(self) -> str:
        """`server`, which holds the template, and the digest of the further fields of each request."""
        extra = self.config.extra_body
        return f"server {json_digest(dict(extra))}" if extra else "server"

    @property
    def revision(self) -> str:
        """What the server calls the model, with what stands behind the name; asked for once.

        Raises:
            KeelwrightError: The server cannot be asked, or has no such model.
        """
        if self._revision is None:
            with contextlib.closing(stream(self._find_model)) as found:
                for pieces in found:
                    self._revision = pieces[-1]
        return self._revision or self.name

    @property
    def usage(self) -> Usage:
        """Requests, tokens and cost so far."""
        return self._tally.usage(self.config.price_in, self.config.price_out)

    def plan(self) -> dict[str, str]:
        """Return words for the plan that is shown before work starts: where prompts go, and with which key."""
        key = f"the key of {self.config.api_key_env}" if self._key() else "no key"
        return {"server": f"{self._url} ({'this machine' if self._is_local else 'prompts leave this machine'}, {key})"}

    def answer(
        self,
        items: Sequence[Item],
        decoding: DecodingConfig,
        *,
        have: Collection[tuple[str, int]] = (),
        on_batch: Callable[[Sequence[Generation]], None] | None = None,
        progress: Progress = Silent(),  # noqa: B008 - it has no state
    ) -> list[Generation]:
        """Return the model's answers; see `core.protocols.Engine`.

        Args:
            items: Requests; their ids must differ.
            decoding: How to decode.
            have: Answers that are there already, as pairs of item id and sample.
            on_batch: Called in this thread with the answers that have come since the last call.
            progress: Told of each finished item, and of what went wrong.

        Raises:
            DataError: Two items share an id.
            ConfigError: The server has no such model, or refuses a setting or every item.
            MissingError: The server refuses the key, is not there, or does not answer any more.
            OfflineError: The server cannot be reached.
        """
        wanted = wanted_answers(items, decoding, have)
        if not wanted:
            return []
        _ = self.revision
        if not self._is_listed:
            progress.note(f"The server at {self._url} does not list its models: the name '{self.name}' is not checked.")
        outcomes = self._outcomes()
        done: dict[tuple[str, int], Generation] = {}

        def hand_over(ready: Sequence[Generation]) -> None:
            done.update({(one.item_id, one.sample): one for one in ready})
            if ready and on_batch is not None:
                on_batch(ready)
            progress.advance(len(ready))

        def work(put: Callable[[Outcome | str], None]) -> Coroutine[Any, Any, None]:
            return self._ask_all(wanted, decoding, put)

        with contextlib.closing(stream(work)) as arrived:
            for pieces in arrived:
                for piece in pieces:
                    if isinstance(piece, str):
                        progress.note(piece)
                ready: list[Generation] = []
                try:
                    for piece in pieces:
                        if isinstance(piece, Outcome):
                            ready += outcomes.take(piece)
                finally:
                    hand_over(ready)
        hand_over(outcomes.rest())
        for line in outcomes.summary():
            progress.note(line)
        return [done[item.item_id, sample] for item, sample in wanted]

    async def _ask_all(
        self, wanted: Sequence[tuple[Item, int]], decoding: DecodingConfig, put: Callable[[Outcome | str], None]
    ) -> None:
        waiting = iter(wanted)
        async with Exchange(self._line(), self._pacer, self._tally, put) as exchange:

            async def ask_next() -> None:
                for item, sample in waiting:
                    put(await self._ask(exchange, item, sample, decoding))

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.config.concurrency, len(wanted))):
                        group.create_task(ask_next())
            except BaseExceptionGroup as several:
                raise _first(several) from None

    async def _ask(self, exchange: Exchange, item: Item, sample: int, decoding: DecodingConfig) -> Outcome:
        seed = decoding.seed_of(item.item_id, sample)
        reason, words, began = "", "", time.monotonic()
        try:
            answer = await self._answer(exchange, item, seed, decoding)
        except Unanswered as failed:
            reason, words = failed.reason, failed.words
        except Refused as refused:
            if error := self._fatal(refused):
                raise error from None
            reason, words = refused.why.value, refused.words
        else:
            if answer.finish is not None:
                return Outcome(
                    Generation(
                        item_id=item.item_id,
                        output=answer.text,
                        n_tokens=answer.completion_tokens or 0,
                        finish=answer.finish,
                        seed=seed,
                        sample=sample,
                        n_prompt_tokens=answer.prompt_tokens,
                    ),
                    began=began,
                )
            reason = Why.BLOCKED.value
        self._tally.failures[reason] += 1
        return Outcome(
            Generation(item.item_id, "", 0, "error", seed, sample), reason, words, began=began, ended=time.monotonic()
        )

    async def _answer(self, exchange: Exchange, item: Item, seed: int | None, decoding: DecodingConfig) -> Answer:
        """Ask once, and once more where the server knows the limit on tokens by its other name."""
        path = "completions" if decoding.as_is else "chat/completions"
        texts = [text for text in (item.prompt, item.system) if text]
        guess = sum(len(text.encode()) for text in texts) / _BYTES_PER_TOKEN + decoding.max_new_tokens
        hide = {text: "<prompt>" for text in texts if len(text) >= _HIDDEN_FROM}
        limit = _LIMITS[0] if decoding.as_is else self._limit
        body = {**_body(item, seed, decoding), **self.config.extra_body, "model": self.name}

        async def ask(limit: str) -> Answer:
            sent = {**body, limit: decoding.max_new_tokens}
            return await exchange.ask(path, read_answer, body=sent, tokens=guess, hide=hide)

        try:
            answer = await ask(limit)
        except Refused as refused:
            if refused.why is not Why.LIMIT or decoding.as_is:
                raise
            limit = _LIMITS[1 - _LIMITS.index(limit)]
            answer = await ask(limit)
            self._limit = limit
        self._count(answer, guess)
        return answer

    def _count(self, answer: Answer, guess: float) -> None:
        tally = self._tally
        if answer.completion_tokens is None:
            tally.uncounted += 1
        else:
            used = (answer.prompt_tokens or 0) + answer.completion_tokens
            self._pacer.settle(used - guess)
        tally.prompt_tokens += answer.prompt_tokens or 0
        tally.completion_tokens += answer.completion_tokens or 0
        if answer.served_by is not None:
            tally.served_by.add(answer.served_by)

    async def _find_model(self, put: Callable[[str], None]) -> None:
        """Hand over what the server calls the model, before any item is sent."""
        async with Exchange(self._line(), self._pacer, self._tally, lambda _: None) as exchange:
            try:
                offered = await exchange.ask("models", read_models)
            except Refused as refused:
                if refused.why is Why.PLACE:
                    self._is_listed = False
                    put(self.name)
                    return
                raise self._fatal(refused) or self._outcomes().stopped(refused.why.value, refused.words) from None
            except Unanswered as failed:
                raise self._outcomes().stopped(failed.reason, failed.words) from None
        if self.name not in offered:
            raise unknown_model(self.name, self._url, offered)
        behind = offered[self.name]
        put(self.name if behind == self.name else f"{self.name} ({behind})")

    def _line(self) -> Line:
        config = self.config
        return Line(
            url=self._url,
            key=self._key(),
            is_local=self._is_local,
            concurrency=config.concurrency,
            timeout_s=config.timeout_s,
            retries=config.retries,
            backoff_s=config.backoff_s,
        )

    def _outcomes(self) -> Outcomes:
        return Outcomes(self._url, self.name, is_local=self._is_local)

    def _fatal(self, refused: Refused) -> KeelwrightError | None:
        name = self.config.api_key_env
        variable = f"{name} is {'set' if self._key() else 'not set'}" if name else "api_key_env is empty"
        return fatal(refused, url=self._url, model=self.name, variable=variable)

    def _key(self) -> str | None:
        """Return the key from the environment; it is kept nowhere else."""
        name = self.config.api_key_env
        key = os.environ.get(name, "").strip() if name else ""
        if not key:
            return None
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ConfigError(
                f"The key in the environment variable {name} cannot be sent.",
                expected="printable ASCII characters without blanks",
                found="others (they are not shown here)",
                fix=f"set {name} again",
            )
        if not self._is_local and not self._url.startswith("https:"):
            raise ConfigError(
                f"The key in {name} would travel to {self._url} unencrypted.",
                expected="https, or a server on this machine",
                found=self._url.partition(":")[0],
                fix="use https, or set api_key_env to '' to send no key",
            )
        return key


def _body(item: Item, seed: int | None, decoding: DecodingConfig) -> dict[str, Any]:
    """Return what the request says of the item and of how to decode."""
    if decoding.as_is:
        asked: dict[str, Any] = {"prompt": item.prompt}
    else:
        messages = [{"role": "user", "content": item.prompt}]
        if item.system is not None:
            messages.insert(0, {"role": "system", "content": item.system})
        asked = {"messages": messages}
    sampling = {} if seed is None else {"top_p": decoding.top_p, "seed": seed}
    return {**asked, "temperature": decoding.temperature, **sampling}


def _address(base_url: str) -> tuple[str, str, bool]:
    """Return the address without a slash at its end, its host, and whether that is this machine."""
    try:
        parts = urlsplit(base_url.strip())
        host, port = parts.hostname or "", parts.port
    except ValueError:
        parts, host, port = urlsplit(""), "", None
    usable = parts.scheme in ("http", "https") and host and not (parts.query or parts.fragment)
    if not usable or parts.username is not None or parts.password is not None:
        # A password in the address is not repeated here.
        secret = "@" in parts.netloc
        raise ConfigError(
            "The address of the server cannot be used.",
            expected="http://HOST:PORT/v1 or https://HOST/v1, without a name, a password or a query",
            found="an address with a name or a password" if secret else repr(base_url),
            fix="put the key into the environment" if secret else "write it like http://localhost:8000/v1",
        )
    shown = f"[{host}]" if ":" in host else host
    place = f"{parts.scheme}://{shown}{'' if port is None else f':{port}'}{parts.path.rstrip('/') or '/v1'}"
    return place, host, is_this_machine(host)


def _first(several: BaseExceptionGroup[BaseException]) -> BaseException:
    first = several.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
