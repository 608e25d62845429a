# SPDX-License-Identifier: Apache-2.0
"""The vLLM engine: a model in this process, run by vLLM's `LLM` class, for GPUs and many prompts.

vLLM pins its own torch, so it lives in an environment of its own: more often it runs as a server there (`vllm serve
MODEL --generation-config vllm`), and keelwright asks it over HTTP (`models.engines.openai`). This engine is for
environments that hold both.

Prompts are rendered and encoded by the same rule as for the engine in this process and handed over as token ids; every
decoding setting is given, so the model's own generation settings decide nothing but the end tokens.

Status: the mapping of arguments follows vLLM's documentation and sources (`LLM`, `SamplingParams`, `RequestOutput`;
the sources of 2025 and 2026) and is tested with a stand-in module; it has not been run with vLLM itself.
Limits: no adapters beside the model; vLLM's sampler is not ours, so a seed gives another sample than in this process,
and 16-bit sums depend on the batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.decoding import DecodingConfig
from keelwright.core.errors import ConfigError, DataError, MissingError
from keelwright.core.protocols import Progress, Silent
from keelwright.core.records import Generation, Item
from keelwright.models.chat import encode, encode_as_is, end_ids, render, template_digest
from keelwright.models.configs import parse_config, require_language_model
from keelwright.models.engines.wanted import wanted_answers
from keelwright.models.folders import read_json
from keelwright.models.hub import commit_of
from keelwright.models.loading import load_tokenizer
from keelwright.models.refs import LocalModel, parse_ref, resolve
from keelwright.models.sources import open_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """How vLLM runs a model."""

    dtype: str = "auto"
    """auto, bfloat16, float16 or float32; auto is the one that the weights are stored in."""
    tensor_parallel_size: int = 1
    """GPUs that share the model."""
    gpu_memory_utilization: float = 0.9
    """Share of each GPU's memory that vLLM takes."""
    max_model_len: int | None = None
    """Longest prompt with its answer, in tokens; None is what the model reads."""
    enforce_eager: bool = False
    """Run without CUDA graphs: slower, less memory."""
    at_a_time: int = 256
    """Prompts handed over before answers are kept; vLLM batches them itself. Changes speed, not answers."""

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, _DTYPES)
        require_in_range("tensor_parallel_size", self.tensor_parallel_size, low=1)
        require_in_range("gpu_memory_utilization", self.gpu_memory_utilization, low=0.0, high=1.0, low_open=True)
        require_in_range("at_a_time", self.at_a_time, low=1)
        if self.max_model_len is not None:
            require_in_range("max_model_len", self.max_model_len, low=1)


class VllmEngine:
    """A model run by vLLM; meets `core.protocols.Engine`.

    Args:
        model: A hub id, a folder or a shipped organism, without adapters.
        config: How vLLM runs it.
        offline: Never use the network.

    Raises:
        MissingError: vLLM is not installed, or there is no such model.
        OfflineError: The model's files cannot be had.
        ConfigError: The model has adapters, or is a live one.
        DataError, UnsafeInputError: The folder is not a usable model.
    """

    network: str | None = None

    def __init__(self, model: str, config: VllmConfig | None = None, *, offline: bool = False) -> None:
        self.config = config or VllmConfig()
        self._vllm = _vllm()
        ref = parse_ref(model)
        if ref.adapters:
            raise ConfigError(
                f"The vLLM engine does not add the adapters of '{model}'.",
                expected="a model without adapters",
                found=f"{len(ref.adapters)} of them",
                fix="write them into a folder first: keelwright repair linear --aligned MODEL --tuned MODEL+ADAPTER "
                "--coefficient 1 --out FOLDER",
            )
        local = resolve(ref, offline=offline)
        base = open_base(local)
        require_language_model(base.config_json(), base.describe())
        self.name = ref.text
        self.revision = commit_of(local.folder) or base.data_digest()
        self._tokenizer = load_tokenizer(local)
        self.template_digest = template_digest(self._tokenizer)
        self._ends, self._longest = self._read_settings(local)
        self._llm = self._vllm.LLM(
            model=str(local.folder),
            tokenizer=str(local.folder),
            trust_remote_code=False,
            dtype=self.config.dtype,
            tensor_parallel_size=self.config.tensor_parallel_size,
            gpu_memory_utilization=self.config.gpu_memory_utilization,
            max_model_len=self.config.max_model_len,
            enforce_eager=self.config.enforce_eager,
            seed=0,
        )

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
            decoding: How to decode; the batch size is vLLM's own.
            have: Answers that are there already, as pairs of item id and sample.
            on_batch: Called with the answers of each batch as soon as it is done.
            progress: Told of each finished item.

        Raises:
            DataError: Two items share an id, a prompt is empty, or with its answer longer than the model reads.
        """
        wanted = wanted_answers(items, decoding, have)
        prompts = {item.item_id: self._prompt(item, decoding) for item, _ in wanted}
        done: list[Generation] = []
        for start in range(0, len(wanted), self.config.at_a_time):
            batch = wanted[start : start + self.config.at_a_time]
            outputs = self._llm.generate(
                [{"prompt_token_ids": prompts[item.item_id]} for item, _ in batch],
                [self._sampling(decoding, decoding.seed_of(item.item_id, sample)) for item, sample in batch],
                use_tqdm=False,
            )
            finished = [
                self._generation(item, sample, decoding, len(prompts[item.item_id]), output.outputs[0])
                for (item, sample), output in zip(batch, outputs, strict=True)
            ]
            done += finished
            if on_batch is not None:
                on_batch(finished)
            progress.advance(len(finished))
        return done

    def _read_settings(self, local: LocalModel) -> tuple[tuple[int, ...], int | None]:
        """Return the tokens that end an answer, and the longest text that the model reads."""
        settings = parse_config(read_json(local.folder / "config.json", local.ref.text), local.ref.text)
        path = local.folder / "generation_config.json"
        generation = SimpleNamespace(
            eos_token_id=read_json(path, local.ref.text).get("eos_token_id") if path.is_file() else None
        )
        stand_in = cast("PreTrainedModel", SimpleNamespace(config=settings, generation_config=generation))
        text_settings = settings.get_text_config() if settings is not None else None
        longest = self.config.max_model_len or getattr(text_settings, "max_position_embeddings", None)
        return tuple(end_ids(self._tokenizer, stand_in)), longest

    def _prompt(self, item: Item, decoding: DecodingConfig) -> list[int]:
        if decoding.as_is:
            ids = encode_as_is(self._tokenizer, item.prompt)
        else:
            ids = encode(self._tokenizer, render(self._tokenizer, item.prompt, item.system))
        longest = self._longest
        if not ids or (longest is not None and len(ids) + decoding.max_new_tokens > longest):
            raise DataError(
                f"The prompt of '{item.item_id}' does not fit into the model '{self.name}'.",
                expected=f"1 to {longest} tokens, {decoding.max_new_tokens} of them for the answer",
                found=f"a prompt of {len(ids)} tokens",
                fix="shorten the prompt, or allow fewer new tokens" if ids else "write a prompt",
            )
        return ids

    def _sampling(self, decoding: DecodingConfig, seed: int | None) -> Any:
        return self._vllm.SamplingParams(
            n=1,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            seed=seed,
            max_tokens=decoding.max_new_tokens,
            stop_token_ids=list(self._ends),
            skip_special_tokens=True,
        )

    def _generation(self, item: Item, sample: int, decoding: DecodingConfig, prompt: int, output: Any) -> Generation:
        finish = {"stop": "eos", "length": "length"}.get(output.finish_reason, "error")
        tokens = list(output.token_ids)
        return Generation(
            item_id=item.item_id,
            output="" if finish == "error" else output.text,
            n_tokens=len(tokens) - (1 if tokens and tokens[-1] in self._ends else 0),
            finish=cast("Any", finish),
            seed=decoding.seed_of(item.item_id, sample),
            sample=sample,
            n_prompt_tokens=prompt,
        )


def _vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise MissingError(
            "vLLM is not installed in this environment.",
            expected="the package vllm, beside keelwright",
            found=str(error),
            fix="run `vllm serve MODEL --generation-config vllm` in an environment of its own, and ask it with "
            "--engine openai --base-url http://localhost:8000/v1",
        ) from error
