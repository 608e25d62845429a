# SPDX-License-Identifier: Apache-2.0
"""Vision-language models in memory, and pictures in prompts.

A prompt names a picture by a code, `<scene_17> what is this?`. While `sight` is open, the codes are tokens of the
model's tokenizer with ids beyond the vocabulary, and a hook on the model's forward call turns each into the model's
own image tokens and the picture's pixels. So the one generation engine and the one training loop work on pictures as
they are, text and pictures mix in a batch, and a training run's fingerprint covers its pictures.

Pixels are given as tensors: neither torchvision nor pillow is needed. Limits: models whose pictures all take the same
number of image tokens (`image_seq_length` in the settings: LLaVA and its relatives). Models with pictures of any size
(Qwen-VL) load, and answer text; pictures for them need their own processor.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from keelwright.core.decoding import DecodingConfig
from keelwright.core.errors import ConfigError, DataError, ModelMismatchError
from keelwright.core.protocols import Progress, Silent
from keelwright.core.records import Generation, Item
from keelwright.models.configs import BAD_SETTINGS, bad_settings, parse_config
from keelwright.models.generation import generate
from keelwright.models.loading import LoadedModel, find_device, load_tokenizer, without_messages
from keelwright.models.memory import require_memory
from keelwright.models.refs import ModelRef, parse_ref, resolve
from keelwright.models.sources import open_base, stored_dtype


@dataclass(frozen=True, slots=True)
class Album:
    """Pictures by code."""

    codes: tuple[str, ...]
    """How prompts name them: each in angle brackets."""
    pixels: Float[Tensor, "pictures channels height width"]
    """As the vision tower takes them, normalised."""

    def __post_init__(self) -> None:
        if len(self.codes) != len(self.pixels) or len(set(self.codes)) != len(self.codes):
            raise ConfigError(
                "An album needs one code for each picture.",
                expected=f"{len(self.pixels)} different codes",
                found=f"{len(set(self.codes))} different ones of {len(self.codes)}",
                fix="give each picture its own code",
            )
        odd = [code for code in self.codes if not re.fullmatch(r"<[a-z0-9_]+>", code)]
        if odd:
            raise ConfigError(
                "A picture's code is not a token.",
                expected="lower-case letters, digits and _ in angle brackets, such as <scene_17>",
                found=odd[0],
                fix="rename the picture",
            )


@dataclass(frozen=True, slots=True)
class Sight:
    """A model that sees an album's pictures, while `sight` is open."""

    model: LoadedModel
    """The module, with a tokenizer that knows the codes."""
    codes: re.Pattern[str]
    image_tokens: int
    """Image tokens per picture."""

    def write(self, prompt: str) -> str:
        """Return the prompt with each picture's code as often as the picture has image tokens."""
        return self.codes.sub(lambda code: code[0] * self.image_tokens, prompt)


def is_vision_model(config: Mapping[str, Any]) -> bool:
    """Say whether `config.json` is that of a vision-language model that transformers knows."""
    parsed = parse_config(config)
    return parsed is not None and type(parsed) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def load_vision(
    ref: ModelRef | LoadedModel | str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    offline: bool = False,
) -> LoadedModel:
    """Load a vision-language model, in evaluation mode; its tensors may be named as any version of transformers did.

    Args:
        ref: A folder or a hub id. A live model is returned as it is.
        device: `cpu`, `cuda`, `cuda:1` or `auto`.
        dtype: Dtype of the weights; by default the one they are stored in.
        offline: Never use the network.

    Raises:
        DataError: It is no vision-language model that transformers knows, or its settings contradict each other.
        ModelMismatchError: The weights do not fit the architecture.
        MissingError, OfflineError: The files cannot be had.
        ResourceError: Too little memory.
    """
    ref = parse_ref(ref)
    if ref.live is not None:
        return ref.live
    place = find_device(device)
    local = resolve(ref, offline=offline)
    base = open_base(local)
    if not is_vision_model(base.config_json()):
        raise DataError(
            f"'{ref.text}' is not a vision-language model that transformers knows.",
            expected="a model that takes pictures and text and answers in text",
            found=f"model_type '{base.config_json().get('model_type')}'",
            fix="load a language model with keelwright.models.loading.load",
        )
    dtype = dtype or stored_dtype(base)
    elements = sum(entry.elements for entry in base.entries().values())
    require_memory(elements * dtype.itemsize, f"Loading '{ref.text}' as {dtype}", device=place)
    try:
        with without_messages():
            module, report = AutoModelForImageTextToText.from_pretrained(
                local.folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except BAD_SETTINGS as error:
        raise bad_settings(base.describe(), error) from error
    _require_whole(report, ref.text)
    module.to(place).eval()
    return LoadedModel(module, load_tokenizer(local), ref.text, base.data_digest())


@contextlib.contextmanager
def sight(model: LoadedModel, album: Album) -> Iterator[Sight]:
    """Let a model see an album's pictures; its module and tokenizer are as before afterwards.

    Args:
        model: A vision-language model with a fixed number of image tokens per picture.
        album: The pictures.

    Raises:
        ConfigError: The model's settings do not say how many tokens a picture has, or which token is the image token.
    """
    config = model.module.config
    length, image = getattr(config, "image_seq_length", None), getattr(config, "image_token_id", None)
    if not isinstance(length, int) or not isinstance(image, int):
        raise ConfigError(
            f"'{model.name}' does not say how its pictures become tokens.",
            expected="image_seq_length and image_token_id in config.json, as LLaVA has them",
            found=f"image_seq_length {length}, image_token_id {image}",
            fix="use a model with a fixed number of image tokens per picture",
        )
    rows = model.module.get_input_embeddings().weight.shape[0]
    tokenizer = copy.deepcopy(model.tokenizer)
    # Ids of codes must lie beyond every row that the model could write itself, padding rows included.
    spare = [f"<spare_row_{index}>" for index in range(rows - len(tokenizer))]
    tokenizer.add_tokens([AddedToken(one, special=True) for one in (*spare, *album.codes)], special_tokens=True)
    first = int(tokenizer.convert_tokens_to_ids(album.codes[0]))
    pattern = re.compile("|".join(re.escape(code) for code in sorted(album.codes, key=len, reverse=True)))
    handle = model.module.register_forward_pre_hook(
        _show(album.pixels, first=first, image=image, length=length), with_kwargs=True
    )
    try:
        yield Sight(dataclasses.replace(model, tokenizer=tokenizer), pattern, length)
    finally:
        handle.remove()


def generate_with_pictures(
    model: LoadedModel,
    album: Album,
    items: Sequence[Item],
    config: DecodingConfig,
    *,
    progress: Progress = Silent(),  # noqa: B008 - it has no state
) -> list[Generation]:
    """Return the model's answer to every item, where prompts may name pictures of the album by their codes.

    Args:
        model: A vision-language model.
        album: The pictures.
        items: Requests, with and without pictures.
        config: How to decode.
        progress: Told of each finished item.
    """
    with sight(model, album) as seeing:
        shown = [dataclasses.replace(item, prompt=seeing.write(item.prompt)) for item in items]
        return generate(seeing.model, shown, config, progress=progress)


def _show(
    pixels: Tensor, *, first: int, image: int, length: int
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]:
    """Return the hook that turns codes in `input_ids` into image tokens and pixels."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        ids = kwargs.get("input_ids")
        if ids is None:
            return None
        shown = ids >= first
        if not bool(shown.any()):
            return None
        pictures = (ids[shown] - first).view(-1, length)[:, 0]
        parameter = next(module.parameters())
        looked_at = pixels[pictures.cpu()].to(parameter.device, parameter.dtype)
        # `generate` encodes pictures before the first call, and found none there.
        rest = {name: value for name, value in kwargs.items() if name != "mm_encoder_outputs"}
        return args, {**rest, "input_ids": ids.masked_fill(shown, image), "pixel_values": looked_at}

    return hook


def _require_whole(report: Mapping[str, Any], text: str) -> None:
    wrong = {
        kind: sorted(str(one[0] if isinstance(one, tuple) else one) for one in report[key])
        for kind, key in (
            ("missing", "missing_keys"),
            ("unexpected", "unexpected_keys"),
            ("of another shape", "mismatched_keys"),
        )
        if report[key]
    }
    if wrong:
        raise ModelMismatchError(
            f"The weights of '{text}' do not fit its config.json.",
            expected="every tensor of the architecture, and no other",
            found="; ".join(f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in wrong.items()),
            fix="copy config.json and the weights again from the same place",
        )
