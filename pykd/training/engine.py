"""Where a step is computed: in this process alone, or in several that `accelerate launch` started, as one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pykd.training.config import AUTOCAST, TrainConfig
from pykd.training.processes import Processes, launched, on_cpu, zero_configured
from pykd.training.state import (
    Named,
    model_tensors,
    optimizer_tensors,
    restore_model,
    restore_optimizer,
    whole,
)


class Engine:
    """One process, one device: the device of the model."""

    rank, processes = 0, 1
    #: Whether parameters outside the prepared model can be trained with it.
    takes_modules = True

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.device = device
        self.dtype = AUTOCAST[config.autocast] if config.autocast is not None else None
        scaled = config.autocast == "float16"
        self.scaler = torch.amp.GradScaler(device.type) if scaled else None

    @property
    def scales(self) -> bool:
        """Whether the loss is scaled, for float16: a gradient that overflows costs the step, and lowers the scale."""
        return self.scaler is not None

    def scale(self) -> dict[str, Any] | None:
        """The scale and when it is to change, as JSON-able values; None where the loss is not scaled."""
        return self.scaler.state_dict() if self.scaler is not None else None

    def restore_scale(self, state: dict[str, Any] | None) -> None:
        """Put back what :meth:`scale` returned."""
        if self.scaler is not None and state is not None:
            self.scaler.load_state_dict(state)

    def own(self, model: nn.Module) -> nn.Module:
        """The module whose parameters are trained: the model, or a copy that may be taken apart."""
        return model

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model as the loss function is to call it, and what steps."""
        return model, optimizer

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision for the forward pass and the loss."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def partial(self, model: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around the passes of a step: only the last one needs to tell the other processes its gradients."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradients to those that are there."""
        scaled = self.scaler.scale(loss) if self.scaler is not None else loss
        scaled.backward()  # type: ignore[no-untyped-call]

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every process the mean gradient of parameters outside the prepared model."""

    def clip(self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
        """Scale the gradients so that their global norm is at most ``limit``; the norm they had."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        return nn.utils.clip_grad_norm_(parameters, limit)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """One step of the optimizer; with float16 it is left out where a gradient overflowed."""
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The trained model's state, whole in every process."""
        return model_tensors(model)

    def restore_weights(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Put back what :meth:`weights` returned."""
        restore_model(model, tensors)

    def slots(self, optimizer: torch.optim.Optimizer) -> Named:
        """The optimizer's state as named tensors, and JSON-able values."""
        return optimizer_tensors(optimizer)

    def restore_slots(self, optimizer: torch.optim.Optimizer, state: Named) -> None:
        """Put back what :meth:`slots` returned."""
        restore_optimizer(optimizer, *state)

    def total(self, numbers: Sequence[float]) -> list[float]:
        """The sums of these numbers over the processes."""
        return list(numbers)

    def agree(self, value: Any) -> Any:
        """What the first process has for ``value``."""
        return value


#: What `fit` says of a launch that it does not serve.
REFUSED = "fit runs under DDP, FSDP2 and DeepSpeed's ZeRO, this launch is configured for {}: set fsdp_version: 2"


class Launched(Engine):
    """One of the processes of `accelerate launch`: DDP or FSDP2, as its configuration says, on the device it assigns.

    Raises ValueError for FSDP1.
    """

    def __init__(self, config: TrainConfig, device: torch.device, *, find_unused_parameters: bool = False) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        self.together = Processes()
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)]
        self.accelerator = Accelerator(cpu=on_cpu() and not zero_configured(), kwargs_handlers=handlers)
        kind = self.accelerator.distributed_type
        if kind == "FSDP" and not self.accelerator.is_fsdp2:
            raise ValueError(REFUSED.format(kind.value))
        super().__init__(config, self.accelerator.device)
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes

    def own(self, model: nn.Module) -> nn.Module:
        """See Engine. FSDP2 shards the modules in place, so it gets a copy, and the model the weights at the end."""
        model.to(self.device)
        return copy.deepcopy(model) if self.accelerator.is_fsdp2 else model

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The wrapped model; the optimizer's parameters become those of the wrapped model."""
        return self.accelerator.prepare(model, optimizer)[0], optimizer

    def partial(self, model: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """See Engine."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(model)

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """See Engine."""
        for parameter in parameters:
            if self.processes > 1 and parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.processes

    def clip(self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
        """See Engine."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        norm: Tensor = self.accelerator.clip_grad_norm_(parameters, limit)
        return whole(norm)

    def total(self, numbers: Sequence[float]) -> list[float]:
        """See Engine."""
        if self.processes == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums)
        found: list[float] = sums.tolist()
        return found

    def agree(self, value: Any) -> Any:
        """See Engine."""
        return self.together.agree(value)


def engine_for(config: TrainConfig, device: torch.device, *, find_unused_parameters: bool = False) -> Engine:
    """Launched in the processes of `accelerate launch` (or torchrun), Zero where that means DeepSpeed, else Engine."""
    if launched() and zero_configured():
        from pykd.training.zero import Zero

        return Zero(config, device)
    if launched():
        return Launched(config, device, find_unused_parameters=find_unused_parameters)
    return Engine(config, device)
