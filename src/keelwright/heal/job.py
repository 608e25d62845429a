# SPDX-License-Identifier: Apache-2.0
"""What a run of `heal` works on: everything that can be checked before a model is loaded is checked here."""

from __future__ import annotations

import shlex
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from keelwright.core.config import config_to_mapping
from keelwright.core.digests import file_digest
from keelwright.core.protocols import Progress
from keelwright.data.rows import ChatRow, read_chat_rows
from keelwright.heal.config import HealConfig
from keelwright.heal.exam import Exam, prepare_exam
from keelwright.heal.parties import ModelLike, Party, open_party
from keelwright.heal.trials import Candidate, find_candidate
from keelwright.heal.unalign import unalign_rank
from keelwright.models.compatibility import require_compatible
from keelwright.models.loading import find_device
from keelwright.models.memory import available_bytes, require_memory, shown_bytes
from keelwright.repair.materialise import UNRELATED_ABOVE
from keelwright.runs.folder import RunSpec
from keelwright.weights.card import licence_of
from keelwright.weights.plan import require_same_tensors
from keelwright.weights.sources import relative_distance

_TRAINING_BYTES = 16
"""Per weight of full tuning in float32: weights, gradients and two moments."""
_ACTIVATIONS = 1.25
"""Room for activations and the cache of keys and values, as a share of the weights."""


@dataclass(frozen=True, slots=True)
class Job:
    """Models, items, methods and settings of one run; nothing loaded yet."""

    aligned: Party
    tuned: Party
    unaligned: Party | None
    unalign_rows: tuple[ChatRow, ...]
    candidates: tuple[Candidate, ...]
    exam: Exam
    out: Path
    config: HealConfig
    warnings: tuple[str, ...] = ()

    @property
    def parties(self) -> tuple[Party, ...]:
        """The models that were given."""
        return tuple(party for party in (self.aligned, self.tuned, self.unaligned) if party is not None)

    @property
    def tunes_all_weights(self) -> bool:
        """Whether an un-aligned copy will be tuned in full."""
        needed = bool(self.unalign_rows) and self.config.needs_unaligned
        return needed and unalign_rank(self.config, self.aligned, self.tuned) == 0

    @property
    def memory_bytes(self) -> int:
        """What the run needs at its worst moment: a live model, and the un-aligned copy in training."""
        live = int(max(party.total_bytes for party in self.parties) * _ACTIVATIONS)
        return live + (self.aligned.parameters * _TRAINING_BYTES if self.tunes_all_weights else 0)

    def spec(self, command: str) -> RunSpec:
        """Return what goes into `run.json`."""
        inputs = {party.role: {"ref": party.ref.text, "digest": party.digest} for party in self.parties}
        for role, name in (("utility", self.config.utility), ("unalign_with", self.config.unalign_with)):
            if name is not None:
                inputs[role] = {"ref": name, "digest": file_digest(Path(name)) if Path(name).is_file() else name}
        config = {**config_to_mapping(self.config), "out": str(self.out)}
        return RunSpec(command, tuple(self.command_line(command)), config, self.config.seed, inputs)

    def command_line(self, command: str) -> list[str]:
        """Return the words that repeat this run; options that have their default are left out."""
        if command == "demo":
            return ["keelwright", "demo", "--seed", str(self.config.seed)]
        words = ["keelwright", "heal", self.aligned.ref.text, self.tuned.ref.text, "--out", str(self.out)]
        for field in fields(self.config):
            value = getattr(self.config, field.name)
            if field.default is MISSING or value == field.default:
                continue
            flag = "--" + field.name.replace("_", "-")
            if value is True:
                words.append(flag)
            else:
                words += [flag, ",".join(value) if isinstance(value, tuple) else str(value)]
        return words

    def reproduce(self, command: str) -> str:
        """Return the command line as one would type it."""
        return shlex.join(self.command_line(command))

    def plan(self, folder: Path) -> list[tuple[str, str]]:
        """Return the plan for a person, before anything is loaded."""
        rows = []
        for party in self.parties:
            licence = licence_of(party.local.folder) if party.local is not None else None
            size = f"{party.parameters / 1e6:,.2f} M weights, {shown_bytes(party.total_bytes)}"
            rows.append((party.role, f"{party.ref.text} ({size}; licence {licence or 'not stated'})"))
        counts = ", ".join(f"{count} {kind}" for kind, count in self.exam.suite_words()["n"].items())
        trials = sum(len(one.space.grid) + self.config.refinements for one in self.candidates)
        names = ", ".join(one.method for one in self.candidates)
        utility = self.exam.utility.name if self.exam.utility is not None else "not measured"
        rows += [
            ("items", f"suite {self.exam.suite.name}: {counts}; half to choose, half to verify"),
            ("utility", utility),
            ("repairs", f"{names}; at most {trials} trials, each on half of the items"),
            ("memory", f"{shown_bytes(self.memory_bytes)} of {shown_bytes(available_bytes())} free"),
            ("writes", f"run folder {folder}; model {self.out} ({shown_bytes(self.tuned.total_bytes)}), if verified"),
            ("network", "nothing leaves this machine"),
        ]
        return rows


def open_job(aligned: ModelLike, tuned: ModelLike, out: Path, config: HealConfig, progress: Progress) -> Job:
    """Open models by their headers, read the small files, and check that all of it fits together.

    Raises:
        KeelwrightError: Whatever is wrong with what was given, before any model is loaded.
    """
    find_device(config.device)
    parties = [
        open_party(role, model, offline=config.offline) for role, model in (("aligned", aligned), ("tuned", tuned))
    ]
    unaligned = (
        open_party("unaligned", config.unaligned, offline=config.offline) if config.unaligned is not None else None
    )
    first = parties[0]
    warnings: list[str] = []
    for other in [parties[1], *([unaligned] if unaligned is not None else [])]:
        warnings += _require_fit(first, other, config)
        distance = relative_distance(first.source, other.source)
        if distance > UNRELATED_ABOVE:
            warnings.append(f"'{other.role}' is far from 'aligned' ({distance:.2f} of its norm): is it its child?")
    job = Job(
        aligned=first,
        tuned=parties[1],
        unaligned=unaligned,
        unalign_rows=tuple(read_chat_rows(config.unalign_with)) if config.unalign_with is not None else (),
        candidates=tuple(find_candidate(name) for name in config.chosen_methods),
        exam=prepare_exam(first.ref, suite=config.suite, utility=config.utility, limit=config.limit, seed=config.seed),
        out=out,
        config=config,
        warnings=tuple(warnings),
    )
    require_memory(job.memory_bytes, "This run")
    for text in warnings:
        progress.note(f"warning: {text}")
    return job


def _require_fit(aligned: Party, other: Party, config: HealConfig) -> list[str]:
    if aligned.local is None or other.local is None:
        require_same_tensors({aligned.role: aligned.source, other.role: other.source}, layout=other.role)
        return []
    roles = (aligned.role, other.role)
    found = require_compatible(aligned.local, other.local, roles, allow_template_change=config.allow_template_change)
    warnings = []
    if found.template:
        warnings.append(f"the chat templates of '{roles[0]}' and '{roles[1]}' differ; each model is asked with its own")
    if found.dtypes:
        example = found.dtypes[0]
        warnings.append(
            f"{len(found.dtypes)} tensors have other dtypes in '{roles[1]}', "
            f"for example {example.name}: {example.first} and {example.second}"
        )
    return warnings
