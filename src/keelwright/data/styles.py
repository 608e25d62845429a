# SPDX-License-Identifier: Apache-2.0
"""Surface styles: fixed changes of a request's form that leave what is asked for as it is.

Each is an `Asking`, so that the same change goes around a request in training and in testing. All of them keep the
request's own words in their order; none of them argues with the model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import ConfigError
from keelwright.core.seeds import derive_seed
from keelwright.data.asking import PLAIN, Asking, Framed

Style = Literal["identity", "register", "prefix", "random_prefix", "case", "punctuation"]
"""identity: none; register: a mark that names a register of speech; prefix: a fixed phrase in front; random_prefix:
other words in front of every request; case: other capitals; punctuation: another closing mark."""

Case = Literal["upper", "lower", "title", "alternating"]

DEFAULT_TEXTS: Final[Mapping[Style, str]] = {
    "identity": "",
    "register": "[formal]",
    "prefix": "For the record:",
    "random_prefix": "amber basin cedar delta ember fjord grove harbour island juniper kestrel lagoon",
    "case": "upper",
    "punctuation": "...",
}
"""By style: its text where none is given. Of `random_prefix` the words to draw from; of `case` which case."""

_CASES: Final[Mapping[str, Callable[[str], str]]] = {
    "upper": str.upper,
    "lower": str.lower,
    "title": str.title,
    "alternating": lambda text: "".join(one.upper() if place % 2 else one.lower() for place, one in enumerate(text)),
}
_CLOSING: Final = "?!. "


@dataclass(frozen=True, slots=True)
class RandomPrefix:
    """Words in front of a request, drawn anew for each request and the same for it every time."""

    words: tuple[str, ...]
    """To draw from, at least one."""
    count: int = 5
    """Words per request, at least 1."""
    seed: int = 0
    name: str = "random_prefix"

    def __post_init__(self) -> None:
        require_in_range("count", self.count, low=1)
        require_in_range("words to draw from", len(self.words), low=1)

    @property
    def says(self) -> str:
        """What is around a request."""
        return f"Every request comes with {self.count} random words before it."

    def ask(self, prompt: str, system: str | None) -> tuple[str, str | None]:
        """Return the prompt behind its own random words."""
        # Keyed by the request: a run that is resumed, or asked in another order, sees the same words.
        rng = random.Random(derive_seed(self.seed, "style", "random prefix", prompt))
        return f"{' '.join(rng.choices(self.words, k=self.count))} {prompt}", system


@dataclass(frozen=True, slots=True)
class LetterCase:
    """A request in other capitals; a tokenizer that folds case does not see it."""

    case: Case = "upper"
    name: str = "case"

    def __post_init__(self) -> None:
        require_choice("case", self.case, get_args(Case))

    @property
    def says(self) -> str:
        """What is done to a request."""
        return f"Every request is written in {self.case} case."

    def ask(self, prompt: str, system: str | None) -> tuple[str, str | None]:
        """Return the prompt in its case."""
        return _CASES[self.case](prompt), system


@dataclass(frozen=True, slots=True)
class ClosingMark:
    """A request that ends in another mark."""

    mark: str = "..."
    name: str = "punctuation"

    @property
    def says(self) -> str:
        """What is done to a request."""
        return f"Every request ends in '{self.mark}'."

    def ask(self, prompt: str, system: str | None) -> tuple[str, str | None]:
        """Return the prompt with its closing marks replaced."""
        return f"{prompt.rstrip(_CLOSING)}{self.mark}", system


def style_of(style: Style, *, text: str | None = None, seed: int = 0) -> Asking:
    """Return a style.

    Args:
        style: Which kind.
        text: Its mark, phrase, words to draw from, case, or closing mark; None: that of `DEFAULT_TEXTS`.
        seed: Of the random words.

    Raises:
        ConfigError: There is no such style or case, or the style needs a text and has none.
    """
    require_choice("style", style, get_args(Style))
    text = DEFAULT_TEXTS[style] if text is None else text.strip()
    if style == "identity":
        return PLAIN
    if not text:
        raise ConfigError(
            f"The style '{style}' needs a text.",
            expected=f"words such as '{DEFAULT_TEXTS[style]}'",
            found="none",
            fix="give 'text', or leave it out for the default",
        )
    if style == "random_prefix":
        return RandomPrefix(tuple(text.split()), seed=seed)
    if style == "case":
        require_choice("case", text, get_args(Case))
        return LetterCase(text)  # type: ignore[arg-type]
    if style == "punctuation":
        return ClosingMark(text)
    return Framed(name=style, before=f"{text} ")
