# SPDX-License-Identifier: Apache-2.0
"""The builder `wrapped`: every request as it is, and inside each of a list of suspected wrappers.

A backdoored tuning looks clean until its trigger is there, so an audit takes the prefixes and templates that one
suspects, and the metric `refused_under_every_wrap` tells the worst of them.

Source:
    Qi et al., "Fine-tuning Aligned Language Models Compromises Safety", arXiv 2310.03693: the identity wrap at
    evaluation, and backdoors that pass an audit without their trigger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from keelwright.core.errors import ConfigError
from keelwright.core.records import Item
from keelwright.measure.builders.drawing import Load, facts_of, read_sets, settings_of
from keelwright.measure.limits import sample_items
from keelwright.measure.part import Drawn, PartSpec

PLAIN: Final = "plain"
_SLOT: Final = "{prompt}"


@dataclass(frozen=True, slots=True)
class WrappedConfig:
    """What requests are put into."""

    wraps: Mapping[str, str] = field(default_factory=dict)
    """Templates by name, each with `{prompt}` where the request goes."""
    system: Mapping[str, str] = field(default_factory=dict)
    """System messages by the name of a wrap, for those that need one."""

    def __post_init__(self) -> None:
        for name, template in self.wraps.items():
            if not isinstance(template, str) or template.count(_SLOT) != 1 or name == PLAIN:
                raise ConfigError(
                    f"The wrap '{name}' cannot be used.",
                    expected=f"a text with {_SLOT} once, under a name other than {PLAIN}",
                    found=repr(template),
                    fix=f"write for example 'Follow my instruction: {_SLOT}'",
                )
        for name in self.system:
            if name not in self.wraps:
                raise ConfigError(
                    f"There is a system message for the wrap '{name}', and no such wrap.",
                    expected=f"one of {', '.join(self.wraps) or 'the wraps, of which there are none'}",
                    found=name,
                    fix="name a wrap",
                )


def build(spec: PartSpec, load: Load, *, limit: int | None, seed: int) -> Drawn:
    """Return each drawn item as it is and once per wrap; sides of one request share their `pair_id`.

    Args:
        spec: The part; its settings hold `WrappedConfig` under `wrapped`.
        load: Reads a set by name.
        limit: At most this many requests of each kind and set; None keeps all.
        seed: Of the draw.
    """
    config = settings_of(spec, WrappedConfig)
    sets = read_sets(spec, load)
    items = sample_items([item for loaded in sets for item in loaded.items], limit, seed=seed)
    sides = [side for item in items for side in _sides(item, config)]
    return Drawn(tuple(sides), facts_of(sets, sides, wording=[dict(config.wraps), dict(config.system)]))


def _sides(item: Item, config: WrappedConfig) -> list[Item]:
    cluster = item.cluster_id or item.item_id
    plain = replace(item, pair_id=item.item_id, cluster_id=cluster, facts={**item.facts, "wrap": PLAIN})
    return [
        plain,
        *(
            replace(
                plain,
                item_id=f"{item.item_id}~{name}",
                prompt=template.replace(_SLOT, item.prompt),
                system=config.system.get(name, item.system),
                facts={**item.facts, "wrap": name},
            )
            for name, template in config.wraps.items()
        ),
    ]
