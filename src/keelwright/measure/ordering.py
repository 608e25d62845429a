# SPDX-License-Identifier: Apache-2.0
"""From the settings of an audit to the parts that are asked: suite, sets, judges and remedy by name."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from keelwright.core.protocols import Progress
from keelwright.measure.audit_config import AuditConfig
from keelwright.measure.mitigations import find_mitigation
from keelwright.measure.panel import panel_of
from keelwright.measure.part import Part
from keelwright.measure.suites.building import Ordered, build_parts
from keelwright.measure.suites.loading import read_suite
from keelwright.models.refs import parse_ref
from keelwright.weights.parties import ModelLike

_HUB: Final = "hub"


def suite_name(config: AuditConfig, model: ModelLike) -> str:
    """Return the suite that is asked: of `auto` that of the lab for its models, else `core`."""
    if config.suite != "auto":
        return config.suite
    return "workshop" if config.engine == "hf" and parse_ref(model).kind == "lab" else "core"


def ordered_parts(config: AuditConfig, suite: str, progress: Progress) -> tuple[Part, ...]:
    """Return the parts of a suite as an audit's settings order them; no model is loaded.

    Args:
        config: The audit's settings.
        suite: Name of the suite, a YAML file, or several.
        progress: Told of a cache that was damaged.

    Raises:
        KeelwrightError: A name is not known, a set cannot be read, or a judge needs what is not there.
    """
    ordered = Ordered(
        find_judge=panel_of(config, progress),
        judges=config.judges,
        data=None if config.data in (None, _HUB) else Path(config.data),
        hub=config.data == _HUB and not config.offline,
        limit=config.limit,
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        mitigation=None if config.mitigation is None else find_mitigation(config.mitigation),
    )
    return build_parts(read_suite(suite), ordered)


def items_digest(parts: tuple[Part, ...]) -> str:
    """Return the digest of everything that the parts' sets hold."""
    return " ".join(one.digest for part in parts for one in part.sets)


def hosts_of(parts: tuple[Part, ...]) -> list[str]:
    """Return the hosts that judges send answers to."""
    hosts = [getattr(judge, "network", None) for part in parts for judge in part.judges]
    return [host for host in dict.fromkeys(hosts) if host]
