# SPDX-License-Identifier: Apache-2.0
"""Models that are too large for one machine's memory: weights spread over processes with FSDP2.

    accelerate launch --num_processes 4 tune.py         # or torchrun

    module = shard(AutoModelForCausalLM.from_pretrained(...))   # in every process
    train(module, tokenizer, recipe, folder=...)
    module.save_pretrained(out, state_dict=whole_state(module), is_main_process=...)

Every process holds a part of each weight, of its gradient and of its optimiser state; a layer's weights are whole only
while it computes. The gradient composer moves, copies and adds parts, and takes norms over all of them, so a composed
step is the step of one process. Checkpoints hold whole tensors: a run may go on with another number of processes.

The sharding is done here with `torch.distributed.fsdp.fully_shard`, not by accelerate's plugin, which accelerate 1.15
ignores where there is no accelerator (its state becomes MULTI_CPU, never FSDP).

Limits:
    A method that needs a frozen copy of the model can have one only where an adapter is trained. New adapters go on
    before the sharding. A loss must call the model itself, not a part of it: the weights are gathered by that call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from keelwright.core.errors import ConfigError
from keelwright.ops.gradients import Gradient, scaled, squared_norm
from keelwright.training.processes import in_float32, local


class Sharded:
    """Every process holds a part of each weight; gradients are summed by the backward pass that makes them."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def gradient(self, loss: Tensor, weights: Sequence[Tensor]) -> Gradient:
        """Return this process's part of the gradient of the loss, summed over the processes already."""
        # `torch.autograd.grad` says None for every sharded weight: the backward pass hands the parts to `.grad` alone.
        for weight in weights:
            weight.grad = None
        loss.backward()
        found = [weight.grad for weight in weights]
        for weight in weights:
            weight.grad = None
        # FSDP2 takes the mean over the processes; the shares of a loss add up.
        return scaled(in_float32(found), float(self._accelerator.num_processes))

    def reduce(self, gradient: Gradient) -> Gradient:
        """Return the gradient as it is."""
        return gradient

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over the processes."""
        total: Tensor = self._accelerator.reduce(value, reduction="sum")
        return total

    def norm(self, gradient: Gradient) -> Tensor:
        """Return the norm over the parts of all processes."""
        parts = [None if one is None else local(one) for one in gradient]
        return self.sum(squared_norm(parts).to(self._accelerator.device)).sqrt()


def shard(module: PreTrainedModel) -> PreTrainedModel:
    """Spread a model's weights over the processes, layer by layer; in place, and for good.

    Args:
        module: The whole model, the same in every process, on the device where it is trained.

    Raises:
        ConfigError: There is one process only.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # As the loop makes it: a bare PartialState would not see a launch on CPUs.
    processes = Accelerator(device_placement=False).num_processes
    if processes < 2:
        raise ConfigError(
            "There is one process, and nothing to spread the weights over.",
            expected="at least 2 processes",
            found=str(processes),
            fix="start with 'accelerate launch --num_processes 2 ...' or torchrun, or leave 'shard' out",
        )
    mesh = init_device_mesh(next(module.parameters()).device.type, (processes,))
    kinds = set(getattr(module, "_no_split_modules", None) or ())
    for child in [one for one in module.modules() if type(one).__name__ in kinds]:
        fully_shard(child, mesh=mesh)
    # The root too gives its weights back after each pass: else a pass without a backward one would leave whole
    # weights behind, and a step or a shift that follows would not be seen.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return module


def is_sharded(module: nn.Module) -> bool:
    """Return whether any weight is spread over processes."""
    return any(isinstance(one, DTensor) for one in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor; every process must ask, in the same order."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    return cast("DTensor", tensor.detach()).full_tensor()


def spread_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor, the same in every process, in the parts of another."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the model's whole tensors by name, on the CPU; every process must ask."""
    return {name: whole(one).cpu() for name, one in module.state_dict().items()}


def whole_tree(tree: Any, *, keep: bool) -> Any:
    """Return an optimiser's state with whole tensors on the CPU.

    Args:
        tree: Dicts, lists and tuples of tensors and plain values; every process must ask.
        keep: Whether this process wants it; False: it only takes part, and gets an empty dict.
    """
    found = _map(tree, lambda one: whole(one).cpu() if keep or isinstance(one, DTensor) else one)
    return found if keep else {}


def spread_optimizer(state: dict[str, Any], weights: Sequence[Tensor]) -> dict[str, Any]:
    """Return an optimiser's state in the parts of the weights that it belongs to.

    Args:
        state: Whole tensors, of one parameter group in the order of the weights.
        weights: As the optimiser has them.
    """
    parts = {
        number: {
            name: spread_as(one, weights[number]) if isinstance(one, Tensor) else one for name, one in kept.items()
        }
        for number, kept in state["state"].items()
    }
    return {**state, "state": parts}


def _map(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _map(one, change) for key, one in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_map(one, change) for one in tree)
    return tree
