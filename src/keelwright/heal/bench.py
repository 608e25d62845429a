# SPDX-License-Identifier: Apache-2.0
"""The bench: asks a model what the run folder does not know yet, and scores what it knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from keelwright.core.decoding import DecodingConfig
from keelwright.core.protocols import Judge, Progress
from keelwright.core.records import Estimate, Item, Record
from keelwright.heal.decide import Measured, measured
from keelwright.heal.exam import Exam, Part
from keelwright.measure.asking import measure, missing_items
from keelwright.measure.audit import decoding_for
from keelwright.measure.harness import ask_harness
from keelwright.measure.lm_eval_tasks import LmEvalUtility
from keelwright.measure.metrics import excluded
from keelwright.measure.suites import suite_digest
from keelwright.measure.utility import TaskUtility, TextUtility, WindowLosses, perplexity_ratio
from keelwright.models.loading import LoadedModel
from keelwright.report.text import percent
from keelwright.runs.folder import RunFolder

REFERENCE = "tuned"
"""The model whose perplexity the others' are held against."""

MUCH_INCOHERENT = 0.10
"""Share of incoherent answers, 0..1, above which rates say little about safety."""

LoadModel = Callable[[], LoadedModel]


class Bench:
    """Measures models of one run; every answer is kept in the run folder as it is made."""

    def __init__(
        self, exam: Exam, run: RunFolder, progress: Progress, *, batch_size: int, max_new_tokens: int | None
    ) -> None:
        self.exam = exam
        self.run = run
        self.progress = progress
        self.decoding = decoding_for(exam.suite, batch_size=batch_size, max_new_tokens=max_new_tokens)
        self.digest = suite_digest(exam.suite.items())
        self.task_digest = suite_digest(exam.utility.items()) if isinstance(exam.utility, TaskUtility) else ""

    def measure(self, model_id: str, part: Part, load: LoadModel) -> Measured:
        """Ask the model the part's items that have no record yet, and return what it scored.

        Args:
            model_id: Under which name the records are kept.
            part: Which items.
            load: Gives the live model; called only when something is missing.
        """
        items = missing_items(self.exam.items(part), self.run, model_id)
        losses_missing = isinstance(self.exam.utility, TextUtility) and self._losses(model_id) is None
        if items or losses_missing:
            model = load()
            # A trial edits the live model: its records must not pass for those of the checkpoint that was loaded.
            model = dataclasses.replace(model, revision=f"{model.revision}: {model_id}")
            self._ask(model, model_id, items)
            if losses_missing:
                self._read_text(model, model_id)
        return self.measured(model_id, part)

    def measured(self, model_id: str, part: Part) -> Measured:
        """Score the records of a model on a part."""
        records = self.records(model_id, part)
        return measured(records, primary=self.exam.primary, utility=self._text_ratio(model_id, part))

    def records(self, model_id: str, part: Part) -> list[Record]:
        """Return the records of a model on a part, in item order."""
        return list(self.run.find(model_id, [item.item_id for item in self.exam.items(part)]))

    def warnings(self) -> list[str]:
        """Return what a reader of the figures should know."""
        counts = excluded(self.run.records())
        found = [f"{count} answers were left out of the rates: {reason}" for reason, count in counts.items()]
        for model_id in ("aligned", REFERENCE):
            share = self.measured(model_id, "all").metrics.incoherent
            if share is not None and share.value > MUCH_INCOHERENT:
                found.append(
                    f"{percent(share.value)} of the answers of '{model_id}' are incoherent: "
                    f"the suite '{self.exam.suite.name}' may not be one that this model understands"
                )
        return found

    def in_words(self, result: Measured) -> str:
        """Return the figures that decide, on one line."""
        names = (self.exam.primary, "utility", "answer_rate", "over_refusal")
        found = [(name, getattr(result.metrics, name)) for name in names]
        return ", ".join(f"{name.replace('_', ' ')} {one.value:.3f}" for name, one in found if one is not None)

    def _ask(self, model: LoadedModel, model_id: str, items: Sequence[Item]) -> None:
        self.progress.stage(f"asking {model_id}", total=len(items), unit="answers")
        asked = [item for item in items if item.kind != "task"]
        self._keep(model, model_id, asked, self.exam.suite.judge(), self.digest, self.decoding)
        tasks = [item for item in items if item.kind == "task"]
        if tasks and isinstance(self.exam.utility, TaskUtility):
            decoding = DecodingConfig(self.exam.utility.max_new_tokens, self.decoding.batch_size)
            self._keep(model, model_id, tasks, self.exam.utility.judge(), self.task_digest, decoding)
        elif tasks and isinstance(self.exam.utility, LmEvalUtility):
            ids = {item.item_id for item in tasks}
            ask_harness(self.exam.utility, model, self.run, model_id=model_id, progress=self.progress, item_ids=ids)

    def _keep(
        self,
        model: LoadedModel,
        model_id: str,
        items: Sequence[Item],
        judge: Judge,
        digest: str,
        decoding: DecodingConfig,
    ) -> None:
        measure(
            model,
            items,
            judge,
            self.run,
            model_id=model_id,
            digests=digest,
            decoding=decoding,
            progress=self.progress,
        )

    def _read_text(self, model: LoadedModel, model_id: str) -> None:
        if isinstance(self.exam.utility, TextUtility):
            losses = self.exam.utility.losses(model, progress=self.progress)
            self.run.remember(f"losses of {model_id}", dataclasses.asdict(losses))

    def _losses(self, model_id: str) -> WindowLosses | None:
        known = self.run.recall(f"losses of {model_id}")
        return None if known is None else WindowLosses(tuple(known["nats"]), tuple(known["tokens"]))

    def _text_ratio(self, model_id: str, part: Part) -> Estimate | None:
        """Return the ratio of perplexities on the part's windows: even ones to choose, odd ones to verify.

        A text is read whole the first time, so a part of the selection half has the ratio of all its windows.
        """
        if not isinstance(self.exam.utility, TextUtility):
            return None
        reference, own = self._losses(REFERENCE), self._losses(model_id)
        if reference is None or own is None:
            return None
        first, step = {"verification": (1, 2), "all": (0, 1)}.get(part, (0, 2))
        return perplexity_ratio(reference, own, windows=range(first, len(own), step))
