"""The processes of one run: `torchrun` or `accelerate launch` starts them, each with a part of every batch.

Every process draws the same batch, timesteps and noise and takes its part, so that a run on R processes with batches of
B is the run on one process with batches of R B, to rounding. Work over many samples is spread over the processes and
collected again on all. With one process nothing here does anything.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from workbench.common.errors import UserError
from workbench.common.validation import whole_number


@lru_cache(maxsize=1)
def _state() -> Any:
    """accelerate's PartialState, which joins the process group; None with one process."""
    if whole_number("WORLD_SIZE", 1, least=1) == 1:
        return None
    for variable in ("RANK", "LOCAL_RANK"):
        whole_number(variable, 0, least=0)
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def world() -> int:
    """Number of processes."""
    return _state().num_processes if _state() else 1


def rank() -> int:
    """This process's number, from 0."""
    return _state().process_index if _state() else 0


def local_rank() -> int:
    """This process's number on its machine, from 0."""
    return _state().local_process_index if _state() else 0


def is_main() -> bool:
    """Whether this process speaks for the run."""
    return rank() == 0


def pick_device(name: str) -> torch.device:
    """The torch device of a `model.device` setting; "auto" is this process's GPU where there is one.

    Raises:
        UserError: the device is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if world() > 1:
        raise UserError(f"model.device = {name!r}: on several processes each takes its own; leave it at 'auto'")
    try:
        # A tensor is tried: torch.device takes the name of a device that is not there. And a tensor's has its number.
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"model.device = {name!r}: no such device here; try 'auto' or 'cpu'") from None


def agreed(here: bool) -> bool:
    """Whether something is so on every process; all of them have to ask."""
    return here if _state() is None else bool(mean(torch.tensor(float(here), device=_state().device)) == 1)


def anywhere(here: bool) -> bool:
    """Whether something is so on any process; all of them have to ask."""
    return not agreed(not here)


def part_of(count: int) -> slice:
    """This process's part of a batch of `count` * world."""
    return slice(rank() * count, (rank() + 1) * count)


def spread(count: int) -> Tensor:
    """This process's share of 0..count-1: every world-th, as many on each, the last ones repeated to fill up."""
    each = -(-count // world())
    # As many on each, since a collective call waits for tensors of one shape from all.
    return (torch.arange(each) * world() + rank()).clamp(max=count - 1)


def collect(values: Tensor, count: int) -> Tensor:
    """What the processes found for their `spread`, in order, on every process.

    Args:
        values: this process's, (ceil(count / world), ...).
    Returns:
        Shape (count, ...).
    """
    if _state() is None:
        return values
    mine = values.contiguous().to(_state().device)
    parts = [torch.empty_like(mine) for _ in range(world())]
    torch.distributed.all_gather(parts, mine)
    # Undoes `spread`: sample i of process r is number i * world + r. The cut drops what was repeated to fill up.
    return torch.stack(parts, dim=1).flatten(0, 1)[:count].to(values.device)


def mean(values: Tensor) -> Tensor:
    """The mean over processes, the same on each."""
    if _state() is None:
        return values
    # all_reduce writes into its argument.
    total = values.clone()
    torch.distributed.all_reduce(total)
    return total / world()


def mean_of(values: Tensor) -> Tensor:
    """The mean of a tensor's elements over all processes, the same on each; every process has as many."""
    return mean(values.mean())


def wrap(model: nn.Module, how: str, trained: bool) -> nn.Module:
    """The model as it takes part in a run on several processes; itself with one.

    Args:
        how: "ddp": a copy a process, gradients averaged; "fsdp": weights sharded over the processes, in place.
        trained: whether gradients are needed.
    """
    if _state() is None:
        return model
    # fully_shard works in place: the model that others hold is the sharded one, and there is no wrapper to take off.
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for part in (*_blocks(model), model):  # the whole model too: else its own weights stay gathered after a forward
            fully_shard(part, reshard_after_forward=True)
        return model
    # DDP refuses a model without gradients, and a copy that never trains needs no averaging.
    if not trained:
        return model
    # Views: the buckets that are sent are the gradients themselves, not a copy in as much memory again.
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def bare(model: nn.Module) -> nn.Module:
    """The model itself, whose parameters are its own, without what `wrap` may have put around it."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The parts of a denoiser that are gathered one at a time: a UNet's blocks, a transformer's layers."""
    for name in ("down_blocks", "mid_block", "up_blocks", "transformer_blocks"):
        part = getattr(model, name, None)
        if part is not None:
            yield from part if isinstance(part, nn.ModuleList) else [part]


@contextmanager
def gradients(model: nn.Module, shared: bool) -> Iterator[None]:
    """Forward and backward passes in here average their gradients over the processes only if `shared`."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not shared:
        with model.no_sync():
            yield
        return
    # fsdp's way of saying the same.
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(shared)  # type: ignore[operator]
    yield


def local(parameter: Any) -> Tensor:
    """What this process holds of a parameter that may be sharded."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def assign(parameter: Any, value: Tensor) -> None:
    """Copy a whole tensor, or one sharded alike, into a parameter that may be sharded."""
    if hasattr(parameter, "device_mesh") and not hasattr(value, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


@torch.no_grad()
def load(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy whole tensors by name into a model's parameters."""
    for name, parameter in model.named_parameters():
        assign(parameter, values[name])


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters by name, in one piece, on the CPU; every process has to ask."""
    return {name: whole(parameter.detach()).cpu() for name, parameter in model.named_parameters()}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state with tensors in one piece; every process has to ask."""
    state = optimizer.state_dict()
    in_one_piece = lambda x: whole(x) if isinstance(x, Tensor) else x  # noqa: E731
    each = {i: {name: in_one_piece(x) for name, x in values.items()} for i, values in state["state"].items()}
    return state | {"state": each}


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Let an optimizer go on from the state that `optimizer_state` returned, sharded again where its parameters are."""
    parameters: list[Any] = [p for group in optimizer.param_groups for p in group["params"]]

    def placed(parameter: Any, value: Any) -> Any:
        # Moments have their parameter's shape and are sharded like it; counters of steps have not.
        if hasattr(parameter, "device_mesh") and isinstance(value, Tensor) and value.shape == parameter.shape:
            from torch.distributed.tensor import distribute_tensor

            return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        return value

    each = {i: {n: placed(parameters[i], x) for n, x in values.items()} for i, values in state["state"].items()}
    optimizer.load_state_dict({**state, "state": each})


def whole(value: Tensor) -> Tensor:
    """A tensor that may be sharded, in one piece."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def is_sharded(model: nn.Module) -> bool:
    """Whether its weights lie in shards on the processes."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights in one piece on the CPU, of the main process; every process has to ask."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return weights
