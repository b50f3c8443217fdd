"""Weights and optimizer state as whole tensors under names, whatever the number of processes that hold them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Tensors by name, and JSON-able values beside them.
Named = tuple[dict[str, Tensor], dict[str, Any]]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state, whole in every process."""
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def restore_model(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`model_tensors` returned, into as many pieces as the model is in now."""
    current = model.state_dict()
    model.load_state_dict(
        {name: shard_like(value, current[name]) if name in current else value for name, value in tensors.items()}
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Named:
    """Split an optimizer's state into named tensors, whole in every process, and JSON-able values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, slots in state["state"].items():
        for name, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = whole(value)
            else:
                values.setdefault(str(index), {})[name] = value
    return tensors, {"values": values, "param_groups": state["param_groups"]}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Put back what :func:`optimizer_tensors` returned."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {int(index): dict(slots) for index, slots in plain["values"].items()}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = shard_like(tensor, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})


def sharded(model: nn.Module) -> bool:
    """Whether processes hold shares of the weights (FSDP2), so that all of them must make every pass together."""
    return any(getattr(parameter, "device_mesh", None) is not None for parameter in model.parameters())


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is sharded over processes, put together in each of them; any other as it is."""
    full = getattr(tensor, "full_tensor", None)
    return full() if full is not None else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as ``like`` is."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), mesh, like.placements)  # type: ignore[attr-defined]
