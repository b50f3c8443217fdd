"""DeepSpeed's ZeRO (Rajbhandari et al. 2020) as an engine: the optimizer's state, or its gradients too, in shares."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pykd.training.config import TrainConfig
from pykd.training.engine import Launched
from pykd.training.state import Named

#: Sections of a DeepSpeed configuration for which the TrainConfig stands.
OURS = ("optimizer", "scheduler", "amp")
#: What every process holds of the optimizer: the tensors of a slot, by the number of the flat group of parameters.
SHARE = "{rank}.{group}.{slot}"
#: Types of what decides the scale of the loss.
PLAIN = (bool, int, float)


class Zero(Launched):
    """One of the processes of `accelerate launch --use_deepspeed`, at ZeRO stage 1 or 2.

    The TrainConfig decides on batches, optimizer, schedule, clipping and autocast; the DeepSpeed configuration on the
    rest. A copy of the model is trained, in whatever type the configuration asks for; the caller's gets its float32
    weights at the end. Checkpoints hold all shares, so a run is resumed by as many processes. Raises ValueError for
    other stages and for sections that would decide what the TrainConfig decides.
    """

    takes_modules = False

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        if config.autocast == "float16":
            raise ValueError(
                "under DeepSpeed float16 belongs in its configuration (fp16: enabled), which scales the loss itself; "
                "leave autocast out"
            )
        super().__init__(config, device)
        self.limit = config.clip_norm or 0.0
        self.settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
        self.stage = int(self.settings.get("zero_optimization", {}).get("stage", 0))
        if self.stage not in (1, 2):
            raise ValueError(
                f"fit runs at DeepSpeed's ZeRO stages 1 and 2, this launch is configured for stage {self.stage}: "
                "launch without DeepSpeed for stage 0 (DDP), with FSDP2 for weights in shares (3)"
            )
        if found := [name for name in OURS if name in self.settings]:
            raise ValueError(
                f"the DeepSpeed configuration has {' and '.join(found)}, which the training settings decide: remove "
                f"{'them' if len(found) > 1 else 'it'}"
            )
        self.settings.pop("train_batch_size", None)
        self.settings |= {
            "train_micro_batch_size_per_gpu": config.batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.limit,
        }
        if self.dtype is not None:
            self.settings["torch_autocast"] = {"enabled": True, "dtype": str(self.dtype).removeprefix("torch.")}
        self.running: Any = None

    @property
    def scales(self) -> bool:
        """See Engine: as the DeepSpeed configuration says."""
        return bool(self.settings.get("fp16", {}).get("enabled", False))

    def scale(self) -> dict[str, Any] | None:
        """See Engine: the numbers of DeepSpeed's own scaler."""
        if not self.scales:
            return None
        return {name: value for name, value in vars(self.running.optimizer.loss_scaler).items() if type(value) in PLAIN}

    def restore_scale(self, state: dict[str, Any] | None) -> None:
        """See Engine."""
        for name, value in (state or {}).items():
            setattr(self.running.optimizer.loss_scaler, name, value)

    def own(self, model: nn.Module) -> nn.Module:
        """See Engine. DeepSpeed lays the parameters into flat buffers of its own."""
        return copy.deepcopy(model).to(self.device)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """See Engine."""
        self.running = self.accelerator.prepare(model, optimizer)[0]
        return self.running, self.running.optimizer

    def partial(self, model: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """See Engine."""
        self.running.set_gradient_accumulation_boundary(is_boundary=last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See Engine."""
        self.running.backward(loss)

    def clip(self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
        """The norm of the gradients. DeepSpeed clips and steps at once, but not where the norm is not finite."""
        self.running.step()
        norm = self.running.get_global_grad_norm()
        return torch.as_tensor(math.nan if norm is None else norm)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """See Engine: done by clip."""

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """See Engine: in float32 where the model computes in 16 bits."""
        from deepspeed.utils import safe_get_full_fp32_param

        tensors = dict(model.state_dict())
        for name, parameter in model.named_parameters(remove_duplicate=False):
            full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if name in tensors and full is not None:
                tensors[name] = full.to(self.device)
        return tensors

    def restore_weights(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """See Engine."""
        from deepspeed.utils import safe_set_full_fp32_param

        model.load_state_dict(tensors)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                safe_set_full_fp32_param(parameter, tensors[name].to(self.device, torch.float32))

    def slots(self, optimizer: torch.optim.Optimizer) -> Named:
        """See Engine: every process's share."""
        inner: Any = optimizer.optimizer  # type: ignore[attr-defined]
        state = inner.state_dict()
        tensors: dict[str, Tensor] = {}
        for group, found in state["state"].items():
            for slot, value in found.items():
                for rank, share in enumerate(self._gathered(torch.as_tensor(value))):
                    tensors[SHARE.format(rank=rank, group=group, slot=slot)] = share
        return tensors, {"param_groups": state["param_groups"]}

    def restore_slots(self, optimizer: torch.optim.Optimizer, state: Named) -> None:
        """See Engine."""
        found: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state[0].items():
            rank, group, slot = name.split(".", 2)
            if int(rank) == self.rank:
                found.setdefault(int(group), {})[slot] = tensor
        inner: Any = optimizer.optimizer  # type: ignore[attr-defined]
        inner.load_state_dict({"state": found, "param_groups": state[1]["param_groups"]})

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of every process; they have one size."""
        mine = tensor.to(self.device)
        shares = [torch.empty_like(mine) for _ in range(self.processes)]
        torch.distributed.all_gather(shares, mine)
        return shares
