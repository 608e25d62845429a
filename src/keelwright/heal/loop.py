# SPDX-License-Identifier: Apache-2.0
"""The closed loop: measure the loss, try repairs on the live model, choose, verify on other items, write.

Every stage reads what the run folder already has, so a run that was cut off goes on where it stopped and ends in the
same summary. Nothing is written to `out` before the choice is verified.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from keelwright.core.config import config_from_mapping
from keelwright.core.errors import DataError
from keelwright.core.files import require_new_folder
from keelwright.core.protocols import Progress, Silent, TensorSource
from keelwright.heal.bench import Bench
from keelwright.heal.candidates import Candidate
from keelwright.heal.config import HealConfig
from keelwright.heal.decide import Measured, Trial, check_limits, choose, compare_bad, is_worse
from keelwright.heal.job import Job, open_job
from keelwright.heal.outcome import Outcome
from keelwright.heal.output import write_choice
from keelwright.heal.preparing import prepare_all
from keelwright.heal.reporting import ensure_report, write_report
from keelwright.heal.summary import summary_of
from keelwright.heal.trials import Race, Trials
from keelwright.heal.unalign import LORA_ABOVE, require_right_direction, unalign_rank, unaligned_copy
from keelwright.models.loading import LoadedModel
from keelwright.models.threads import threads_for
from keelwright.ops.paired import minimum_detectable_change
from keelwright.runs.folder import RunFolder, default_run_folder, stopwatch
from keelwright.runs.places import require_apart, require_place
from keelwright.weights.live import LiveTrial
from keelwright.weights.parties import ModelLike, Party, check_weights


def heal(
    aligned: ModelLike,
    tuned: ModelLike,
    *,
    out: str | Path,
    run: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Give a tuned model its safety back, if it lost any, and write the repaired model and a report.

    Args:
        aligned: The model as it was when its safety was good, in any form of a model reference.
        tuned: What came of it.
        out: Where the repaired model goes; must not exist, or be empty.
        run: Run folder; `runs/<time>-heal` by default. The same call on the same folder resumes.
        progress: Where to tell what is going on.
        settings: Fields of `HealConfig`: `utility`, `methods`, `unalign_with`, `seed`, ...

    Returns:
        The summary, as `summary.json` holds it; its `verdict` is `repaired`, `no_evidence_of_loss`,
        `no_admissible_repair` or `repair_not_verified`.

    Raises:
        KeelwrightError: What was given is wrong, or the machine lacks something; nothing half-written is left.
    """
    config = config_from_mapping(HealConfig, settings, where="heal")
    return run_heal(aligned, tuned, Path(out), config, run=Path(run) if run else None, progress=progress or Silent())


def run_heal(
    aligned: ModelLike,
    tuned: ModelLike,
    out: Path,
    config: HealConfig,
    *,
    run: Path | None,
    progress: Progress,
    command: str = "heal",
    beside: Collection[str] = (),
    flag: str = "--run",
) -> dict[str, Any]:
    """Run `heal` with a finished config, as the named command; `flag` is its option for the run folder."""
    folder = run or default_run_folder(command)
    require_apart(out, folder)
    is_new = not (folder / "run.json").is_file()
    if is_new:
        require_new_folder(out, flag="--out")
        require_new_folder(folder, flag=flag, beside=beside)
    for place, name in ((folder, flag), (out, "--out")):
        require_place(place, flag=name)
    job = open_job(aligned, tuned, out, config, progress)
    if is_new:
        progress.plan(f"keelwright {command}", job.plan(folder))
        check_weights(job.parties, progress)
    with RunFolder.open(folder, job.spec(command), beside=beside, flag=flag) as keeper:
        done = keeper.finished()
        if done is not None:
            progress.note(f"'{folder}' is finished already; this is its result")
            ensure_report(folder)
            return done
        if keeper.resumed:
            progress.plan(f"keelwright {command}, resumed", job.plan(folder))
        with threads_for(job.tuned.parameters):
            summary = _Loop(job, keeper, progress).run(command)
        keeper.finish(summary)
    write_report(folder)
    return summary


class _Loop:
    """The stages of one run, in order; each keeps what it found in the run folder."""

    def __init__(self, job: Job, run: RunFolder, progress: Progress) -> None:
        self.job = job
        self.run_folder = run
        self.progress = progress
        self.bench = Bench(
            job.exam, run, progress, batch_size=job.config.batch_size, max_new_tokens=job.config.max_new_tokens
        )
        self.seconds: dict[str, float] = {}
        self.candidates = job.candidates
        """Prepared before the first trial, where they need it."""
        self._tuned: LoadedModel | None = None

    def run(self, command: str) -> dict[str, Any]:
        """Run every stage and return the summary."""
        outcome, written = self._stages()
        with stopwatch(self.seconds, "summary"):
            return summary_of(command, self.job, str(self.run_folder.path), self.bench, outcome, written, self.seconds)

    def _stages(self) -> tuple[Outcome, Mapping[str, Any] | None]:
        job, config = self.job, self.job.config
        with stopwatch(self.seconds, "measure_aligned"):
            aligned = self.bench.measure("aligned", "all", lambda: self._load(job.aligned))
        self._announce_time()
        with stopwatch(self.seconds, "measure_tuned"):
            tuned = self.bench.measure("tuned", "all", self._tuned_model)
        evidence = compare_bad(aligned, tuned)
        if evidence.n == 0:
            raise DataError(
                "No answer to a harmful request could be judged for both models.",
                expected="answers that the suite's judge can read",
                found="; ".join(self.bench.warnings()) or "no harmful items",
                fix="look at the answers in records.jsonl of the run folder; is it the right suite for these models?",
            )
        detectable = minimum_detectable_change(
            evidence.n, (evidence.worse + evidence.better) / evidence.n, two_sided=False
        )
        if evidence.p_value >= config.alpha:
            return Outcome("no_evidence_of_loss", evidence, detectable), None
        with stopwatch(self.seconds, "unalign"):
            sources = self._sources()
        race = self._race(sources)
        chosen = choose(
            race.trials, aligned=self._half("aligned"), floors=config.floors, has_utility=job.exam.utility is not None
        )
        outcome = Outcome("no_admissible_repair", evidence, detectable, tuple(race.trials), chosen, race=race)
        if chosen is None:
            return outcome, None
        with stopwatch(self.seconds, "verify"):
            outcome = self._verify(chosen, sources, outcome)
        if outcome.verdict != "repaired":
            return outcome, None
        with stopwatch(self.seconds, "write"):
            return outcome, self._write(chosen, sources)

    def _load(self, party: Party, *, copied: bool = False) -> LoadedModel:
        self.progress.stage(f"loading {party.role}")
        load = party.load_copy if copied else party.load
        return load(device=self.job.config.device, offline=self.job.config.offline)

    def _tuned_model(self) -> LoadedModel:
        if self._tuned is None:
            self._tuned = self._load(self.job.tuned)
        return self._tuned

    def _half(self, model_id: str) -> Measured:
        return self.bench.measured(model_id, "selection")

    def _announce_time(self) -> None:
        if self.run_folder.resumed:
            return  # what was measured before takes no time now, and would tell nothing
        per_pass = self.seconds["measure_aligned"]
        halves = 1 + self.job.most_trials[1] + self.job.needs_unaligned
        asking = per_pass * (1 + halves / 2)
        text = f"one pass over all items takes {per_pass:.1f} s; asking is done in at most {asking:.0f} s"
        learning = [one.method for one in self.candidates if one.needs_preparing]
        self.progress.note(f"{text}, and {', '.join(learning)} must be prepared before that" if learning else text)

    def _sources(self) -> dict[str, TensorSource]:
        """Return tensors by role, with the un-aligned copy made or checked where a method needs it."""
        job = self.job
        sources = {"aligned": job.aligned.source, "tuned": job.tuned.source}
        if job.base is not None and any("base" in candidate.roles for candidate in job.candidates):
            sources["base"] = job.base.source
        if not job.needs_unaligned:
            return sources
        if job.tuned.parameters > LORA_ABOVE:
            self._tuned = None  # two live copies of a large model would not fit where one does
        if job.unaligned is not None:
            given = job.unaligned
            self._check_direction(lambda: self._load(given))
            return {**sources, "unaligned": given.source}
        copy = unaligned_copy(
            self._load(job.aligned, copied=True),
            job.aligned.source,
            job.unalign_rows,
            job.config,
            rank=unalign_rank(job.config, job.aligned, job.tuned),
            check=lambda model: self._check_direction(lambda: model),
            progress=self.progress,
        )
        return {**sources, "unaligned": copy}

    def _check_direction(self, load: Callable[[], LoadedModel]) -> None:
        unaligned = self.bench.measure("unaligned", "selection", load)
        require_right_direction(self._half("aligned"), unaligned, alpha=self.job.config.alpha)

    def _race(self, sources: Mapping[str, TensorSource]) -> Race:
        with stopwatch(self.seconds, "prepare"):
            self.candidates, unprepared = prepare_all(
                self.job, self.run_folder, sources, self._tuned_model, progress=self.progress
            )
        trials = Trials(
            bench=self.bench,
            floors=self.job.config.floors,
            has_utility=self.job.exam.utility is not None,
            refinements=self.job.config.refinements,
            progress=self.progress,
        )
        with stopwatch(self.seconds, "trials"):
            return trials.run(self.candidates, sources, self._tuned_model(), failures=unprepared)

    def _verify(self, chosen: Trial, sources: Mapping[str, TensorSource], outcome: Outcome) -> Outcome:
        """Measure the choice on the other half, and hold it to every limit again."""
        model = self._tuned_model()
        with LiveTrial(model.module, sources) as live:
            live.apply(self._candidate(chosen).build(chosen.coefficient))
            repaired = self.bench.measure(chosen.name, "verification", lambda: model)
        aligned = self.bench.measured("aligned", "verification")
        tuned = self.bench.measured("tuned", "verification")
        self.progress.result(f"verified on the other half: {self.bench.in_words(repaired)}")
        improvement = compare_bad(repaired, tuned)
        checks = check_limits(
            repaired.metrics, aligned=aligned.metrics, tuned=tuned.metrics, floors=self.job.config.floors
        )
        holds = improvement.p_value < self.job.config.alpha and all(check.held for check in checks)
        return dataclasses.replace(
            outcome,
            verdict="repaired" if holds else "repair_not_verified",
            verified=repaired,
            improvement=improvement,
            verification_checks=checks,
            is_still_worse=is_worse(repaired, aligned, self.job.config.floors),
        )

    def _candidate(self, trial: Trial) -> Candidate:
        return next(one for one in self.candidates if one.method == trial.method)

    def _write(self, chosen: Trial, sources: Mapping[str, TensorSource]) -> dict[str, Any]:
        models = {"aligned": "aligned", "tuned": "tuned", "repaired": chosen.name}
        return write_choice(
            self.job,
            self.run_folder,
            chosen,
            self._candidate(chosen),
            sources,
            results={
                role: self.bench.measured(one, "verification").metrics.to_mapping() for role, one in models.items()
            },
            progress=self.progress,
        )
