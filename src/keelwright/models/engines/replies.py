# SPDX-License-Identifier: Apache-2.0
"""What an OpenAI-compatible server says, read strictly: an answer, a refusal of the request, or a malformed reply.

Source: OpenAI API reference, "Create chat completion", "Create completion", "List models" and "Error codes"; vLLM,
"OpenAI-Compatible Server", which answers errors in the same form (older versions: without the outer `error`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from keelwright.core.records import Finish

_ENDED: dict[str, Finish] = {
    "stop": "eos",
    "eos": "eos",
    "eos_token": "eos",
    "stop_sequence": "eos",
    "length": "length",
    "max_tokens": "length",
}
_WITHHELD = "content_filter"
_BLOCKED_CODES = {"content_filter", "content_policy_violation", "invalid_prompt"}
_LONGEST_WORDS = 300


class Malformed(ValueError):
    """The reply has the status of a success and is not an answer."""


class Why(Enum):
    """Why a server refused a request that it will refuse again."""

    KEY = "the key"
    QUOTA = "the account's quota"
    PLACE = "no such model or address"
    LIMIT = "the name of the limit on tokens"
    SETTING = "a setting"
    BLOCKED = "blocked"
    TOO_LONG = "prompt too long"
    REQUEST = "refused request"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as the server gave it."""

    text: str
    finish: Finish | None
    """None: a filter of the server withheld the answer."""
    prompt_tokens: int | None
    completion_tokens: int | None
    served_by: str | None
    """Model, and fingerprint of its settings where there is one."""


class _Message(BaseModel):
    content: str | list[dict[str, Any]] | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    finish_reason: str
    message: _Message | None = None
    text: str | None = None


class _Tokens(BaseModel):
    prompt_tokens: int | None = Field(default=None, ge=0)
    completion_tokens: int | None = Field(default=None, ge=0)


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1, max_length=1)
    usage: _Tokens | None = None
    model: str | None = None
    system_fingerprint: str | None = None


class _Model(BaseModel):
    id: str
    root: str | None = None


class _Models(BaseModel):
    data: list[_Model]


# Some servers leave out the object around the list.
_OFFERED: TypeAdapter[_Models | list[_Model]] = TypeAdapter(_Models | list[_Model])


def read_answer(body: bytes) -> Answer:
    """Return the answer of a reply to a chat or a completion.

    Raises:
        Malformed: It is not JSON, cut off, without exactly one answer, or ended in a way that is not known.
    """
    try:
        reply = _Completion.model_validate_json(body)
    except ValidationError as error:
        raise Malformed(_first_problem(error)) from error
    choice, tokens = reply.choices[0], reply.usage or _Tokens()
    served = " ".join(part for part in (reply.model, reply.system_fingerprint) if part) or None
    withheld = choice.finish_reason == _WITHHELD
    if not withheld and choice.finish_reason not in _ENDED:
        raise Malformed(f"the answer ended with '{choice.finish_reason[:40]}'")
    return Answer(
        text="" if withheld else _text(choice),
        finish=None if withheld else _ENDED[choice.finish_reason],
        prompt_tokens=tokens.prompt_tokens,
        completion_tokens=tokens.completion_tokens,
        served_by=served,
    )


def read_models(body: bytes) -> dict[str, str]:
    """Return the models that a server offers: what each is called, and what stands behind the name.

    Raises:
        Malformed: It is not a list of models.
    """
    try:
        offered = _OFFERED.validate_json(body)
    except ValidationError as error:
        raise Malformed(_first_problem(error)) from error
    return {one.id: one.root or one.id for one in (offered.data if isinstance(offered, _Models) else offered)}


def why_refused(status: int, body: bytes) -> Why:
    """Return the reason of a refusal that asking again does not change.

    Args:
        status: Of the reply, 300 or above.
        body: Of the reply.
    """
    message, code, parameter = _error_of(body)
    text = message.lower()
    settings = ("temperature", "top_p", "seed", "max_tokens", "max_completion_tokens")
    long = ("context length", "maximum model length", "context size")
    tests = (
        (Why.BLOCKED, code in _BLOCKED_CODES or (status == 403 and "flagged" in text)),
        (Why.KEY, status in (401, 403)),
        (Why.QUOTA, code == "insufficient_quota" or status == 402),
        (Why.PLACE, status in (404, 405) or status < 400 or code == "model_not_found"),
        (Why.TOO_LONG, "context_length" in code or any(words in text for words in long) or status == 413),
        (Why.LIMIT, parameter == "max_tokens" or "max_completion_tokens" in text or "'max_tokens'" in text),
        (Why.SETTING, parameter in settings),
    )
    return next((why for why, holds in tests if holds), Why.REQUEST)


def words_of(body: bytes, *, hide: Mapping[str, str]) -> str:
    """Return the server's own words for an error, on one line, at most 300 characters.

    Args:
        body: Of the reply.
        hide: Texts that must not be repeated, and what stands for each.
    """
    message = _error_of(body)[0]
    for secret, stand_in in hide.items():
        message = message.replace(secret, stand_in)
    message = " ".join(message.split())
    return message if len(message) <= _LONGEST_WORDS else message[: _LONGEST_WORDS - 3] + "..."


def _text(choice: _Choice) -> str:
    if choice.message is None:
        if choice.text is None:
            raise Malformed("an answer without text")
        return choice.text
    content = choice.message.content
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    if content is None and choice.message.refusal is not None:
        return choice.message.refusal
    # Nothing was left of the limit after the model had thought.
    if content is None and _ENDED[choice.finish_reason] == "length":
        return ""
    if content is None:
        raise Malformed("an answer without text")
    return content


def _error_of(body: bytes) -> tuple[str, str, str]:
    """Return message, code and parameter of an error reply, each empty where there is none."""
    raw = body.decode("utf-8", errors="replace")
    try:
        value: Any = json.loads(raw)
    except ValueError:
        return raw, "", ""
    inner = value.get("error", value) if isinstance(value, dict) else value
    if not isinstance(inner, dict):
        return str(inner), "", ""
    message = next((inner[key] for key in ("message", "detail", "msg") if inner.get(key)), raw)
    return _plain(message), _plain(inner.get("code")), _plain(inner.get("param"))


def _plain(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value and isinstance(value[0], Mapping):
        # Validation errors of a FastAPI server; their `input` repeats the request.
        return "; ".join(f"{one.get('msg', '')} {one.get('loc', '')}" for one in value if isinstance(one, Mapping))
    return "" if value is None else str(value)


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"])
