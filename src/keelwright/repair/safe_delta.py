# SPDX-License-Identifier: Apache-2.0
"""Safe Delta: keep the entries of the tuning that cost little safety, revert the others, and make good for the rest.

For when a few harmful prompts with the wanted refusals are at hand: the inputs that they cause in every linear layer
say what each changed weight costs there. One pass over those rows, no training.

Source:
    Lu et al.: Safe Delta: Consistently Preserving Safety when Fine-Tuning LLMs on Diverse Datasets, arXiv 2505.12038,
    ICML 2025. Official code: ColinLu50/SafeDelta (no licence file), after SparseGPT.

Equation:
    `H = (2 / n) X X^T + d mean(diag) I`, `U^T U = H^-1` (U upper); for each block of columns, with `delta = W_t - W`:
    entries in growing order of `1 / U_mm^2` are kept while the sum of `delta^2 / U_mm^2` is at most
    `mean(1 / U_mm^2) (s / 2) rows / 4096`, the last 15 % never; what is not kept is `W` (from the aligned weights), and
    the error of each column is made good in the columns after it

    | symbol | name |
    |---|---|
    | W_t | `tuned` |
    | W | starts as `aligned`, and takes up the compensation |
    | X | inputs of the layer on `safety_rows`, in the aligned model |
    | s | `budget`; `coefficient` sets a share of the block's whole cost instead (ours) |
    | d | `damping` |

Differs from the official code:
    Equal to it (commit 3a4ea35, with its sort made stable) within 5e-7 on random layers and on the known answers of the
    tests. Decompositions run in float64. Entries of one column are taken from the top row down, where the code's sort
    leaves their order open. With a reserve that comes to no entry at all the code keeps nothing; here everything may be
    kept. The constants 2, 4096, 15 % and the groups of 4 columns are settings. The paper's own text was not read.

Cost:
    Preparing: one forward pass over the rows; memory `columns^2` float32 for every linear layer (about 28 GB for a 7B
    model). The edit: one `columns^3` decomposition per matrix.

Limits:
    The budget is absolute: it fits models of about 7B with a mild tuning, and means something else at other sizes of
    block and layer; `coefficient` does not. Only a reserve of 0 with coefficient 1 returns the tuned matrices. Only
    linear layers inside the blocks are edited; all else is the aligned model's, as in the code, or by `rest` the tuned
    one's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import ConfigError, NumericalError
from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace
from keelwright.models.names import name_map
from keelwright.ops.second_order import inverse_factor, place_entries
from keelwright.repair.ingredients import Ingredients
from keelwright.repair.safe_lora import is_embedding
from keelwright.training.rows import EncodedRow, batch_of, encode_rows
from keelwright.weights.edit import Edit
from keelwright.weights.virtual import VirtualModel

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]


@dataclass(frozen=True, slots=True)
class SafeDeltaConfig:
    """Settings of Safe Delta."""

    coefficient: float | None = None
    """Share of each block's whole cost that is kept, 0 (aligned) to 1 (ours); None leaves it to `budget`."""
    budget: float = 0.1
    """The code's s, 0 or more: an absolute budget for blocks of 2048 columns and layers of 4096 rows."""
    block_size: int = 2048
    """Columns decided on together, at least 1. The released command; its function's default is 1024."""
    damping: float = 0.01
    """Share of the mean of H's diagonal that is added to it, above 0. From the code."""
    reserve: float = 0.15
    """Share of a block's entries, those of the largest 1 / U_mm^2, that always revert; 0 to 1. From the code."""
    budget_divisor: float = 2.0
    """What `budget` is divided by, above 0. From the code (4096 columns in blocks of 2048)."""
    budget_rows: float = 4096.0
    """Rows at which the budget counts once, above 0. From the code."""
    group: int = 4
    """Columns fixed at once, at least 1; 1 compensates exactly. From the code."""
    rest: Literal["aligned", "tuned"] = "aligned"
    """Where tensors come from that are no linear layer of a block. `aligned` is the code's."""
    batch_size: int = 8
    """Rows per forward pass while preparing, at least 1; changes speed and memory only."""

    def __post_init__(self) -> None:
        if self.coefficient is not None:
            require_in_range("coefficient", self.coefficient, low=0.0, high=1.0)
        require_in_range("budget", self.budget, low=0.0)
        require_in_range("reserve", self.reserve, low=0.0, high=1.0)
        for name in ("block_size", "group", "batch_size"):
            require_in_range(name, getattr(self, name), low=1)
        for name in ("damping", "budget_divisor", "budget_rows"):
            require_in_range(name, getattr(self, name), low=0.0, low_open=True)
        require_choice("rest", self.rest, ("aligned", "tuned"))


def kept_entries(
    weights: Float[Tensor, "rows columns"],
    tuned: Float[Tensor, "rows columns"],
    diagonal: Float[Tensor, " columns"],
    config: SafeDeltaConfig,
) -> Bool[Tensor, "rows columns"]:
    """Return which entries of a block take their tuned value.

    Args:
        weights: The block of the aligned matrix, with the compensation of the blocks before it.
        tuned: The block of the tuned matrix.
        diagonal: U_mm of the block's columns.
        config: Budget and reserve.
    """
    rows, columns = weights.shape
    price = diagonal.square().reciprocal()
    cost = (tuned - weights).square() * price
    if config.coefficient is None:
        limit = float(price.mean()) * config.budget / config.budget_divisor * rows / config.budget_rows
    else:
        limit = config.coefficient * float(cost.sum()) * (1.0 + 1e-12)
    order = torch.argsort(price, stable=True)
    spent = torch.cumsum(cost[:, order].T.flatten(), 0)
    keep = spent <= limit
    keep[keep.numel() - int(config.reserve * keep.numel()) :] = False
    kept = torch.empty_like(weights, dtype=torch.bool)
    kept[:, order] = keep.view(columns, rows).T
    return kept


def safe_delta(
    aligned: Float[Tensor, "rows columns"],
    tuned: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    config: SafeDeltaConfig | None = None,
) -> Float[Tensor, "rows columns"]:
    """Return the matrix with the affordable entries tuned and the others aligned and compensated.

    Args:
        aligned, tuned: The matrix in both models, as `inputs -> outputs` of a linear layer.
        hessian: `(2 / n) X X^T` of the layer's inputs.
        config: Settings.
    """
    config = config or SafeDeltaConfig()
    factor = inverse_factor(hessian, damping=config.damping)
    left, wanted = aligned.double(), tuned.double()
    done = torch.empty_like(left)
    columns = left.shape[1]
    left = left.clone()
    for start in range(0, columns, config.block_size):
        stop = min(start + config.block_size, columns)
        inside = factor[start:stop, start:stop]
        block, target = left[:, start:stop], wanted[:, start:stop]
        kept = kept_entries(block, target, inside.diagonal(), config)
        fixed, errors = place_entries(block, target, kept, inside, group=config.group)
        left[:, stop:] -= errors @ factor[start:stop, stop:]
        done[:, start:stop] = fixed
    return done.to(aligned.dtype)


@dataclass(frozen=True, slots=True, repr=False)
class LayerInputs:
    """What was measured of each linear layer's inputs."""

    hessians: Mapping[str, Tensor]
    """By tensor name: `(2 / n) X X^T` in float32."""
    transposed: frozenset[str]
    """Tensors stored as inputs by outputs."""
    rows: int
    """n: how many rows it was measured on."""

    def __repr__(self) -> str:
        traces = {name: float(one.diagonal().double().sum()) for name, one in self.hessians.items()}
        return f"LayerInputs({self.rows} rows, {traces})"


def layer_inputs(
    module: PreTrainedModel, names: Mapping[str, str], rows: Sequence[EncodedRow], *, batch_size: int, pad_id: int
) -> LayerInputs:
    """Return the second-order statistics of the inputs of every linear layer inside the blocks.

    Args:
        module: The live model.
        names: Tensor by parameter.
        rows: What to run it on; padding is left out.
        batch_size: Rows per forward pass.
        pad_id: Any token id.
    """
    layers = {
        names[f"{path}.weight"]: layer
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and not is_embedding(path) and f"{path}.weight" in names
    }
    sums: dict[str, Tensor] = {}
    keep: list[Tensor] = []

    def watch(name: str) -> Hook:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            given = inputs[0].detach()
            flat = given[keep[0]] if given.ndim == 3 else given
            flat = flat.float()
            product = (flat.T @ flat).cpu()
            sums[name] = sums[name].add_(product) if name in sums else product

        return hook

    device = next(module.parameters()).device
    with _hooks(layers, watch), torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = batch_of(rows[start : start + batch_size], pad_id=pad_id).to(device)
            keep[:] = [batch.attention_mask.bool()]
            module(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    hessians = {name: one.mul_(2.0 / len(rows)) for name, one in sums.items()}
    transposed = frozenset(name for name, layer in layers.items() if isinstance(layer, Conv1D))
    return LayerInputs(hessians, transposed, len(rows))


@contextmanager
def _hooks(layers: Mapping[str, nn.Module], watch: Callable[[str], Hook]) -> Iterator[None]:
    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class SafeDelta(Edit):
    """Safe Delta as a weight edit; `prepare` measures the layers' inputs."""

    config: SafeDeltaConfig = SafeDeltaConfig()
    inputs: LayerInputs | None = None

    config_class: ClassVar[type[SafeDeltaConfig]] = SafeDeltaConfig
    search_space: ClassVar[SearchSpace] = SearchSpace(neutral=1.0, grid=(0.2, 0.4, 0.6, 0.8))
    ingredients: ClassVar[tuple[str, ...]] = ("safety_rows",)

    def roles(self) -> tuple[str, ...]:
        """Return the models it reads."""
        return ("aligned", "tuned")

    def reach(self, name: str) -> Reach:
        """Return MATRIX for linear layers of the blocks, COPY for everything else."""
        return Reach.MATRIX if name in self._measured().hessians else Reach.COPY

    def copies(self, name: str) -> str:
        """Return where tensors come from that are no linear layer."""
        return self.config.rest

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the edited matrix."""
        inputs = self._measured()
        aligned, tuned = chunk.tensors["aligned"], chunk.tensors["tuned"]
        turned = name in inputs.transposed
        pair = (aligned.T, tuned.T) if turned else (aligned, tuned)
        try:
            result = safe_delta(*pair, inputs.hessians[name], self.config)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise NumericalError(
                f"The inputs of '{name}' cannot be inverted.",
                expected="a damped matrix that is positive definite",
                found=str(error),
                fix="raise 'damping', or give more safety rows",
            ) from error
        return (result.T if turned else result).contiguous()

    def prepare(self, ingredients: Ingredients) -> Self:
        """Return the edit with the inputs of every linear layer measured on the safety rows, in the aligned model.

        Args:
            ingredients: The live tuned model, a source for each role, and `safety_rows`.

        Raises:
            DataError: There are no rows.
        """
        ingredients.require(*self.ingredients)
        module, tokenizer, aligned = ingredients.module, ingredients.tokenizer, ingredients.sources["aligned"]
        rows = encode_rows(tokenizer, ingredients.safety_rows, module=module)
        pad_id = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        virtual = VirtualModel(module, aligned, (ingredients.sources["tuned"],))
        ingredients.progress.stage("measuring the layers' inputs")
        with virtual.installed(virtual.weights(lambda name, base, deltas: base)) as live:
            names = name_map(live, aligned)
            found = layer_inputs(live, names, rows, batch_size=self.config.batch_size, pad_id=pad_id)
        return replace(self, inputs=found)

    def _measured(self) -> LayerInputs:
        if self.inputs is None:
            raise ConfigError(
                "Safe Delta has not measured the layers' inputs yet.",
                expected="harmful prompts with the refusals that are wanted",
                found="none",
                fix="give a JSON-lines file of safety rows",
            )
        return self.inputs
