# SPDX-License-Identifier: Apache-2.0
"""Settings of an audit."""

from __future__ import annotations

from dataclasses import dataclass

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import ConfigError

ENGINES = ("hf", "openai", "vllm")


@dataclass(frozen=True, slots=True)
class AuditConfig:
    """Settings of `audit`."""

    suite: str = "auto"
    """Suites or YAML files, joined by commas; `auto` is `workshop` for lab models, else `core`."""
    judges: tuple[str, ...] = ()
    """Judges beside those of the suite, or in place of one of the same name: `qi-rubric:openai:NAME`."""
    data: str | None = None
    """Folder of data sets, or `hub` to fetch them; None looks at KEELWRIGHT_DATA and the hub's cache."""
    mitigation: str | None = None
    """A remedy at the prompt: see `measure.mitigations.MITIGATION_NAMES`."""
    utility: str | None = None
    """Task file, text file (needs `against`), `lab:` task or `lm-eval:` tasks."""
    limit: int | None = None
    """At most this many items of each kind and set, drawn by seed within hazard areas."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; None means what the suite asks for."""
    batch_size: int = 64
    """Answers generated at once."""
    check_batches: int = 0
    """Answers to make again one at a time, to see how many change with the batch; 0: none."""
    seed: int = 0
    """Of the items under a limit, of sampled answers and of bootstraps."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    offline: bool = False
    """Never use the network, but for a server on this machine."""
    allow_pickle: bool = False
    """Also open pickled weights, as tensors only."""
    engine: str = "hf"
    """hf: transformers in this process; openai: a server; vllm: vLLM in this process."""
    base_url: str | None = None
    """Address of an OpenAI-compatible server, such as http://localhost:8000/v1."""
    judge_url: str | None = None
    """Address of the server that answers for judges named NAME:openai:MODEL; None: the hosted one."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's key; the key itself is never kept."""
    concurrency: int = 8
    """Requests to a server on their way at once."""
    requests_per_minute: float | None = None
    """Most requests to a server in a minute; None: no limit."""
    price_in: float | None = None
    """Price of a million tokens read, to report the cost."""
    price_out: float | None = None
    """Price of a million tokens written."""
    cache: str | None = None
    """SQLite file of verdicts of judges that ask a model; None keeps them in the run folder only."""
    validate_judge: tuple[str, ...] = ()
    """Files of people's labels that the judges are held against."""

    def __post_init__(self) -> None:
        require_in_range("batch_size", self.batch_size, low=1)
        require_in_range("check_batches", self.check_batches, low=0)
        if self.limit is not None:
            require_in_range("limit", self.limit, low=1)
        require_choice("engine", self.engine, ENGINES)
        if self.base_url is not None and self.engine != "openai":
            raise ConfigError(
                "A server's address needs the engine that asks servers.",
                expected="--engine openai with --base-url",
                found=f"--engine {self.engine}",
                fix="add --engine openai",
            )
