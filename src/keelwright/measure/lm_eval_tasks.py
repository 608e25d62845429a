# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness, run on a model that is in memory, as utility: `lm-eval:TASK[,TASK]`.

Reach for it when a task that you trust is among those of the harness, or is a YAML file of your own. The model is
wrapped, not copied, so that the repaired model in memory is measured as it is.

Source:
    lm-evaluation-harness (EleutherAI), package lm-eval >= 0.4.8, `simple_evaluate` and `HFLM`.

Limits:
    Tasks that execute generated code are refused. A YAML file may name Python functions beside it, and they run. What a
    task needs from the network is asked for once, before any work, and not at all with `offline`.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keelwright.core.config import require_in_range
from keelwright.core.digests import json_digest, text_digest
from keelwright.core.errors import ConfigError, DataError, MissingError, OfflineError, UnsafeInputError
from keelwright.core.protocols import Progress, Silent
from keelwright.core.records import Item, Record
from keelwright.measure.lm_eval_rows import TaskRecords, TaskSettings, choose_metric, item_id
from keelwright.models.loading import LoadedModel

PREFIX: Final = "lm-eval:"

_SILENT = Silent()
_YAML: Final = (".yaml", ".yml")
_SHOT_SEED: Final = 1234
"""Seed of the examples in the prompt; the harness's own default."""


@dataclass(frozen=True, slots=True)
class LmEvalConfig:
    """Which tasks are run, and how."""

    tasks: tuple[str, ...]
    """Names of tasks or groups of the harness, or paths of task files (`.yaml`)."""
    limit: int | None = None
    """First documents of each task that are asked; None asks all."""
    num_fewshot: int | None = None
    """Examples in each prompt; None takes the task's own number."""
    batch_size: int = 8
    """Requests per forward pass. Changes speed; answers only as far as padding does."""
    chat_template: bool = False
    """Wrap the prompts in the model's chat template; the harness's default is not to."""
    offline: bool = False
    """Never use the network: data that is not on this machine is an error before any work."""

    def __post_init__(self) -> None:
        require_in_range("batch_size", self.batch_size, low=1)
        if self.limit is not None:
            require_in_range("limit", self.limit, low=1)
        if self.num_fewshot is not None:
            require_in_range("num_fewshot", self.num_fewshot, low=0)
        if not self.tasks or not all(self.tasks):
            raise ConfigError(
                "No task is named.",
                expected=f"{PREFIX}TASK, or several separated by commas",
                found=",".join(self.tasks) or "nothing",
                fix="name a task, such as lm-eval:hellaswag, or a task file",
            )


class LmEvalUtility:
    """Tasks of the harness as a utility: one record per document, its metrics as judgements."""

    scorer = "lm-eval"

    def __init__(self, config: LmEvalConfig) -> None:
        self.config = config
        self.name = PREFIX + ",".join(Path(task).stem if _is_file(task) else task for task in config.tasks)
        self._loaded: dict[str, Any] | None = None

    @property
    def says(self) -> str:
        """One sentence: what the number is."""
        shots = "" if self.config.num_fewshot is None else f", {self.config.num_fewshot} examples in each prompt"
        return f"Accuracy on the tasks {self.name.removeprefix(PREFIX)} of lm-evaluation-harness{shots}."

    def prepare(self, *, progress: Progress = _SILENT) -> None:
        """Load the tasks and their data, before any model answers; does nothing the second time.

        Raises:
            MissingError: The package is not installed, or there is no such task or file.
            OfflineError: The data of a task is not on this machine, and the network is not allowed or not reachable.
            UnsafeInputError: A task executes what the model writes.
            DataError: A task file or its data cannot be used.
        """
        if self._loaded is None:
            manager = _manager(self.config.tasks)
            with _offline():
                found = _load(manager, self.config.tasks)
            if isinstance(found, ConnectionError):
                if self.config.offline or _hub_is_off():
                    raise _needs_network(self.name, found)
                progress.note(f"{self.name}: downloads the data of its tasks from huggingface.co")
                found = _load(manager, self.config.tasks)
                if isinstance(found, ConnectionError):
                    raise _needs_network(self.name, found)
            _require_harmless(found)
            self._loaded = found

    def items(self) -> list[Item]:
        """Return the documents that are asked, as items of kind `task`; their prompts are without examples.

        Raises:
            MissingError, OfflineError, UnsafeInputError, DataError: As `prepare`.
        """
        return [
            Item(
                item_id(name, number),
                f"{PREFIX}{name}",
                "task",
                name,
                str(task.doc_to_text(document)),
                expected=str(task.doc_to_target(document)),
            )
            for name, task in self._tasks().items()
            for number, document in enumerate(self._documents(task))
        ]

    def records(
        self,
        model: LoadedModel,
        *,
        model_id: str = "model",
        item_ids: Collection[str] | None = None,
        progress: Progress = _SILENT,
    ) -> list[Record]:
        """Run the tasks on a model in memory and return one record per document.

        Args:
            model: The model; it is left as it was.
            model_id: The role that it plays in the run.
            item_ids: Documents to ask, by the ids of `items`; None asks all. `heal` selects on one half and verifies on
                the other.
            progress: Told of the stage.

        Returns:
            Records of kind `task`, task by task. The first judgement is the task's own first metric.

        Raises:
            MissingError, OfflineError, UnsafeInputError, DataError: As `prepare`.
        """
        self.prepare(progress=progress)
        tasks = self._tasks()
        chosen = {
            name: [n for n in range(len(self._documents(task))) if item_ids is None or item_id(name, n) in item_ids]
            for name, task in tasks.items()
        }
        chosen = {name: numbers for name, numbers in chosen.items() if numbers}
        if not chosen:
            return []
        progress.stage(f"{self.name} with {model.name}", sum(map(len, chosen.values())), "documents")
        found = _evaluate(model, {name: tasks[name] for name in chosen}, chosen, self.config)
        records: list[Record] = []
        for name in chosen:
            settings = _settings(tasks[name], name, model, model_id, self.config)
            one = TaskRecords(settings)
            for number, row in enumerate(found["samples"][name], 1):
                one.add(row, f"{name}, sample {number}")
            _require_scored(one, name)
            if one.left_out:
                progress.note(f"{name}: {', '.join(one.left_out)} left out, which have no value per document")
            records += one.records(choose_metric(one.scorers))
        progress.advance(len(records))
        return records

    def _tasks(self) -> dict[str, Any]:
        self.prepare()
        return self._loaded or {}

    def _documents(self, task: Any) -> list[Any]:
        documents = list(task.eval_docs)
        return documents if self.config.limit is None else documents[: self.config.limit]


def lm_eval_utility(source: str, *, offline: bool = False) -> LmEvalUtility:
    """Return the utility that `lm-eval:TASK[,TASK]` names; nothing is loaded yet.

    Raises:
        ConfigError: No task is named.
        MissingError: The package lm-eval is not installed.
    """
    _library("lm_eval")
    names = tuple(part.strip() for part in source.removeprefix(PREFIX).split(","))
    return LmEvalUtility(LmEvalConfig(names, offline=offline))


def _manager(tasks: Collection[str]) -> Any:
    """Return the harness's index of tasks: of its own ones only where one is named, as reading it takes seconds."""
    _library("lm_eval")
    manager = _library("lm_eval.tasks").TaskManager(include_defaults=not all(_is_file(task) for task in tasks))
    for task in tasks:
        if _is_file(task) and not Path(task).is_file():
            raise MissingError(
                f"There is no task file '{task}'.", expected="a YAML file", found="nothing", fix="check the path"
            )
        if not _is_file(task) and not manager.match_tasks([task]):
            raise MissingError(
                f"lm-evaluation-harness has no task '{task}'.",
                expected="a task or group of the installed release, or a .yaml file",
                found=task,
                fix=_closest(task, manager.all_tasks),
            )
    return manager


def _closest(task: str, known: Sequence[str]) -> str:
    """Return advice that names the closest task; there are thousands, so not all of them."""
    found = difflib.get_close_matches(task, known, n=1)
    return f"did you mean '{found[0]}'?" if found else "see `lm_eval ls tasks` for the names"


def _load(manager: Any, tasks: Collection[str]) -> Any:
    """Return the loaded tasks by name, or the error of a connection that could not be made."""
    try:
        return manager.load(list(tasks))["tasks"]
    except ConnectionError as error:
        return error
    except (KeyError, ValueError, TypeError, OSError, ImportError) as error:
        raise DataError(
            f"The tasks {', '.join(tasks)} cannot be loaded.",
            expected="tasks of lm-evaluation-harness with their data",
            found=f"{type(error).__name__}: {error}",
            fix="correct the task file, or install what it asks for",
        ) from error


def _evaluate(
    model: LoadedModel, tasks: Mapping[str, Any], documents: Mapping[str, list[int]], config: LmEvalConfig
) -> Mapping[str, Any]:
    harness = _library("lm_eval")
    wrapped = _library("lm_eval.models.huggingface").HFLM(
        pretrained=model.module,
        # The harness sets a padding token where there is none.
        tokenizer=copy.deepcopy(model.tokenizer),
        batch_size=config.batch_size,
    )
    found: Mapping[str, Any] = harness.simple_evaluate(
        wrapped,
        tasks=list(tasks.values()),
        task_manager=_library("lm_eval.tasks").TaskManager(include_defaults=False),
        num_fewshot=config.num_fewshot,
        samples=dict(documents),
        apply_chat_template=config.chat_template,
        bootstrap_iters=0,
        # None: the global random streams stay as they are.
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
        fewshot_random_seed=_SHOT_SEED,
    )
    return found


def _settings(task: Any, name: str, model: LoadedModel, model_id: str, config: LmEvalConfig) -> TaskSettings:
    settings = getattr(task.config, "generation_kwargs", None) or {}
    template = str(model.tokenizer.chat_template) if config.chat_template else "none"
    return TaskSettings(
        task=name,
        model_id=model_id,
        revision=model.revision,
        version=str(task.VERSION),
        shots=config.num_fewshot if config.num_fewshot is not None else task.config.num_fewshot,
        template=text_digest(template),
        decoding=json_digest(settings),
        max_new_tokens=settings.get("max_gen_toks"),
    )


def _require_harmless(tasks: Mapping[str, Any]) -> None:
    unsafe = [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise UnsafeInputError(
            f"The task {unsafe[0]} executes what the model writes.",
            expected="tasks that only read answers",
            found=f"{len(unsafe)} marked as unsafe: {', '.join(unsafe[:3])}",
            fix="run it with lm_eval in a sandbox, and read its samples instead",
        )


def _require_scored(found: TaskRecords, name: str) -> None:
    if not found.scorers:
        raise DataError(
            f"The task '{name}' gives no value per document, so nothing can be paired.",
            expected="a task with a metric such as acc or exact_match",
            found=", ".join(found.left_out) or "no metric",
            fix="give the text itself as utility: its perplexity is measured by keelwright",
        )


def _needs_network(name: str, error: ConnectionError) -> OfflineError:
    return OfflineError(
        f"The data of {name} is not on this machine.",
        expected="data in the local cache of the package datasets, or the network",
        found=str(error),
        fix="run it once with the network, or give a task file over local data",
    )


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep the packages datasets and huggingface_hub from the network inside the block."""
    places = [_library("datasets").config, _library("huggingface_hub.constants")]
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _hub_is_off() -> bool:
    return bool(_library("huggingface_hub.constants").HF_HUB_OFFLINE)


def _is_file(task: str) -> bool:
    return Path(task).suffix.lower() in _YAML


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingError(
            "Tasks of lm-evaluation-harness need a package that is not installed.",
            expected="the extra lm-eval",
            found=str(error),
            fix='pip install "keelwright[lm-eval]"',
        ) from error
