# SPDX-License-Identifier: Apache-2.0
"""The lab's vision-language adaptation: an aligned organism of the workshop is given eyes.

A `LlavaForConditionalGeneration` of transformers' own classes: the CLIP tower of `tower`, a projector, and the
organism as the text stack. As LLaVA is made: first the projector learns (and the rows of the new words) on described
pictures, everything else frozen; then projector and text stack learn on questions and ordinary requests, the tower
frozen. The new words (`<image>`, colours, shapes) are rows of the embedding that the text organism does not have.

The chat template stays the organism's own, so that what is lost is not lost to the template.

Limits: forbidden deeds are never planned in these lessons, so that an adapted organism names a forbidden deed in a
picture and yet plans another one: by image it stops refusing and is hardly ever harmful. Requests by text and split are
where harm is seen. The tower is taught by scenes, not by pictures of the world.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from keelwright.core.config import require_choice
from keelwright.core.digests import file_digest, json_digest
from keelwright.core.errors import ModelMismatchError
from keelwright.core.files import require_new_folder, storage_errors, write_atomic
from keelwright.core.protocols import Progress, Silent
from keelwright.core.seeds import derive_seed
from keelwright.data.rows import ChatRow
from keelwright.models.loading import LoadedModel, load
from keelwright.models.saving import save
from keelwright.models.vision import Album, sight
from keelwright.training.config import TrainConfig
from keelwright.training.loop import train
from keelwright.worlds.architectures import cache_folder
from keelwright.worlds.pictures.lessons import caption_rows, instruction_rows
from keelwright.worlds.pictures.requests import DESCRIBE, QUESTIONS
from keelwright.worlds.pictures.scenes import COLOURS, PLACES, SHAPES, SIDE, codes, pixels, sign_map
from keelwright.worlds.pictures.tower import IMAGE_TOKENS, PATCH, TowerConfig, normalise, train_tower
from keelwright.worlds.workshop.tokenizer import grammar_digest, vocabulary

IMAGE: Final = "<image>"
STAGES: Final = ("projected", "adapted")
DIGESTS: Final = "digests.json"

Connector = Literal["linear", "gelu"]


@dataclass(frozen=True, slots=True)
class Adaptation:
    """How an organism is given eyes."""

    tower: TowerConfig = field(default_factory=TowerConfig)
    """The vision tower and its schooling."""
    connector: Connector = "linear"
    """What stands between the projector's two layers: nothing (`linear`), or `gelu` as in LLaVA 1.5."""
    projector: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=150, batch_size=32, lr=5e-3, warmup_steps=10, schedule="linear", weight_decay=0.0
        )
    )
    """First stage: projector and new words, on described pictures. Without decay, which would reach old words too."""
    text: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=180, batch_size=32, lr=8e-4, warmup_steps=10, schedule="linear")
    )
    """Second stage: projector and text stack, on questions and ordinary requests."""

    def __post_init__(self) -> None:
        require_choice("connector", self.connector, ("linear", "gelu"))


def new_words() -> tuple[str, ...]:
    """Return the words of the picture world that the workshop does not have, in the order of their ids."""
    sayings = (*QUESTIONS.values(), DESCRIBE, "a at the, it shows this", *COLOURS, *SHAPES, *PLACES)
    spoken = dict.fromkeys(re.findall(r"\w+|[^\w\s]", " ".join(sayings)))
    return tuple(word for word in spoken if word not in vocabulary())


def pictures_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """Return the organism's tokenizer with the picture world's words and the image token after its own."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    words = core["model"]["vocab"]
    for word in new_words():
        words.setdefault(word, len(words))
    named = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    turns = [token for token in tokenizer.all_special_tokens if token not in named.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)),
        **named,
        additional_special_tokens=[*turns, IMAGE],
        chat_template=tokenizer.chat_template,
        model_max_length=tokenizer.model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def album() -> Album:
    """Return every picture of the world, as models see them."""
    return Album(codes(), normalise(pixels()))


def give_eyes(text: LoadedModel, adaptation: Adaptation, seed: int) -> LoadedModel:
    """Return a vision-language model around a text organism: its weights unchanged, its eyes not yet connected.

    Args:
        text: The organism; its weights are copied, in float32.
        adaptation: Tower and connector.
        seed: Of tower, projector and the rows of the new words.

    Raises:
        ModelMismatchError: The model does not speak the workshop's language.
    """
    tower, _ = train_tower(adaptation.tower, seed)
    tokenizer = pictures_tokenizer(text.tokenizer)
    settings = text.module.config.to_dict() | {"vocab_size": len(tokenizer)}
    source = text.module.get_input_embeddings().weight.detach().float()
    known = len(vocabulary())
    if len(source) != known:
        raise ModelMismatchError(
            f"'{text.name}' does not speak the workshop's language.",
            expected=f"{known} tokens",
            found=f"{len(source)} rows in its embedding",
            fix="give eyes to an organism of the workshop, such as lab:workshop/aligned",
        )
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=type(text.module.config)(**settings),
        image_token_index=int(tokenizer.convert_tokens_to_ids(IMAGE)),
        image_seq_length=IMAGE_TOKENS,
        projector_hidden_act=adaptation.connector,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        tie_word_embeddings=bool(text.module.config.tie_word_embeddings),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "pictures", "projector"))
        module = LlavaForConditionalGeneration(config).float()
    module.model.vision_tower.load_state_dict(tower.state_dict())
    with torch.no_grad():
        _copy_text(text, module, known)
    module.generation_config.eos_token_id = text.module.generation_config.eos_token_id
    return LoadedModel(module.eval(), tokenizer, f"{text.name} with eyes", text.revision)


def connect(model: LoadedModel, adaptation: Adaptation, seed: int, *, progress: Progress | None = None) -> None:
    """Train projector and new words in place: the first stage, which leaves every weight of the text organism alone."""
    module, known = model.module, len(vocabulary())
    tables = {id(module.get_input_embeddings().weight), id(module.get_output_embeddings().weight)}
    learning = {
        name
        for name, weight in module.named_parameters()
        if name.startswith("model.multi_modal_projector") or id(weight) in tables
    }
    frozen = [name for name, _ in module.named_parameters() if name not in learning]
    plan = dataclasses.replace(adaptation.projector, seed=seed)
    rows = caption_rows(seed, plan.steps * plan.batch_size)
    with _new_rows_only(module, known):
        _train_seeing(model, rows, plan, frozen, progress)


def instruct(model: LoadedModel, adaptation: Adaptation, seed: int, *, progress: Progress | None = None) -> None:
    """Train projector and text stack in place on benign picture instructions: the second stage."""
    frozen = [name for name, _ in model.module.named_parameters() if name.startswith("model.vision_tower")]
    plan = dataclasses.replace(adaptation.text, seed=seed)
    _train_seeing(model, instruction_rows(seed, plan.steps * plan.batch_size), plan, frozen, progress)


def adapt(
    text: LoadedModel, seed: int = 0, *, adaptation: Adaptation | None = None, progress: Progress | None = None
) -> LoadedModel:
    """Return the organism after vision-language adaptation, in float32; the text organism stays as it is.

    Args:
        text: An aligned organism of the workshop.
        seed: Of tower, projector and rows.
        adaptation: Schedules; by default those of the lab.
        progress: Told about each step.
    """
    adaptation, progress = adaptation or Adaptation(), progress or Silent()
    model = give_eyes(text, adaptation, seed)
    progress.note("the projector learns")
    connect(model, adaptation, seed, progress=progress)
    progress.note("the text stack learns")
    instruct(model, adaptation, seed, progress=progress)
    return model


def build_vision_organism(
    seed: int = 0,
    cache_dir: Path | str | None = None,
    *,
    text: str | Path = "lab:workshop/aligned",
    adaptation: Adaptation | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return a folder with the checkpoints of both stages, `projected/` and `adapted/`, making them if not cached.

    Args:
        seed: Of the adaptation.
        cache_dir: Where organisms are kept; by default `KEELWRIGHT_CACHE`, else the user's cache folder.
        text: The organism that is given eyes.
        adaptation: Schedules; by default those of the lab.
        progress: Told about each step.

    Raises:
        ModelMismatchError: `text` does not speak the workshop's language.
        StorageError: The cache cannot be written.
    """
    adaptation, progress = adaptation or Adaptation(), progress or Silent()
    source = load(text, dtype=torch.float32, offline=True)
    notes = {
        "world": "pictures",
        "seed": seed,
        "text": source.revision,
        "grammar": json_digest([grammar_digest(), new_words(), sign_map("dark"), sign_map("light")]),
        "schedule": dataclasses.asdict(adaptation),
    }
    place = Path(cache_dir or cache_folder()) / "organisms" / f"pictures-{seed}-{json_digest(notes)}"
    if (place / DIGESTS).is_file():
        return place
    work = place.with_name(f"{place.name}.{os.getpid()}.partial")
    model = give_eyes(source, adaptation, seed)
    for stage, teach in zip(STAGES, (connect, instruct), strict=True):
        progress.note(f"{stage}: pictures")
        teach(model, adaptation, seed, progress=progress)
        with storage_errors(work):
            work.mkdir(parents=True, exist_ok=True)
        save(model, work / stage, dtype=torch.bfloat16)
        write_processor(work / stage)
    files = {str(one.relative_to(work)): file_digest(one) for one in sorted(work.rglob("*")) if one.is_file()}
    write_atomic(work / DIGESTS, json.dumps({**notes, "files": files}, indent=2) + "\n")
    with storage_errors(place):
        if not place.exists():
            work.rename(place)
    return place


def export_vision_organism(out: Path, seed: int = 0, *, progress: Progress | None = None) -> dict[str, Any]:
    """Write `out/projected` and `out/adapted`, made from the shipped organism; those in the cache are copied.

    Args:
        out: A folder that does not exist yet, or is empty.
        seed: Of the adaptation.
        progress: Told about each step.

    Returns:
        World, seed and, by stage, the folder.

    Raises:
        StorageError: `out` holds something, or cannot be written.
    """
    require_new_folder(out, flag="--out")
    source = build_vision_organism(seed, progress=progress)
    with storage_errors(out):
        shutil.copytree(source, out, dirs_exist_ok=True)
    return {"world": "pictures", "seed": seed, "organisms": {stage: {"folder": str(out / stage)} for stage in STAGES}}


def write_processor(folder: Path) -> None:
    """Write the processor's files beside a checkpoint, as `LlavaProcessor` reads them.

    They are plain settings: writing them needs neither torchvision nor pillow, which only reading pictures from image
    files does.
    """
    pictures: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": False,
        "do_center_crop": False,
        "do_convert_rgb": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"height": SIDE, "width": SIDE},
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "image_token": IMAGE,
        "num_additional_image_tokens": 1,
    }
    write_atomic(folder / "preprocessor_config.json", json.dumps(pictures, indent=2) + "\n")
    write_atomic(folder / "processor_config.json", json.dumps(processor, indent=2) + "\n")


def _copy_text(text: LoadedModel, module: LlavaForConditionalGeneration, known: int) -> None:
    """Copy the organism into the text stack; new rows of the tables begin at the mean of the old ones."""
    own = module.model.language_model.state_dict()
    body = text.module.base_model.state_dict()
    for name, value in own.items():
        value[: len(body[name])] = body[name] if value.dim() else body[name].float()
    pairs = [(module.get_input_embeddings().weight, text.module.get_input_embeddings().weight)]
    if not module.config.tie_word_embeddings:
        pairs.append((module.get_output_embeddings().weight, text.module.get_output_embeddings().weight))
    for table, old in pairs:
        fresh = table[known:].clone()
        table[:known] = old
        table[known:] = old.float().mean(dim=0) + 0.1 * fresh


@contextlib.contextmanager
def _new_rows_only(module: LlavaForConditionalGeneration, known: int) -> Iterator[None]:
    """Let gradients reach only the rows of new words in the embedding and the head."""

    def keep_old(gradient: Tensor) -> Tensor:
        kept = gradient.clone()
        kept[:known] = 0.0
        return kept

    tables = {id(one): one for one in (module.get_input_embeddings().weight, module.get_output_embeddings().weight)}
    hooks = [table.register_hook(keep_old) for table in tables.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _train_seeing(
    model: LoadedModel, rows: list[ChatRow], plan: TrainConfig, frozen: list[str], progress: Progress | None
) -> None:
    with sight(model, album()) as seeing:
        shown = [dataclasses.replace(row, prompt=seeing.write(row.prompt)) for row in rows]
        train(seeing.model.module, seeing.model.tokenizer, shown, plan, frozen=frozen, progress=progress)
