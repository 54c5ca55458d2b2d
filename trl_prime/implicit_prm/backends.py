"""How a second model trains next to the policy: one backend for each way of distributing it.

Trainer, accelerate and DeepSpeed all assume one trained model a run. What the second needs differs: where its weights
live, when its gradients are exchanged, who clips and steps, and how weights are collected for saving. Everything else
about its update is in `second_model.py` and `updater.py` and the same for all. The second model is the PRM, or a value model
beside it, which has no reference.

| backend | second model | reference |
|---|---|---|
| `DataParallel` | whole on every process, by DDP where there are several | whole |
| `FullyShard` | FSDP2 | FSDP2 |
| `ZeRO` | a DeepSpeed engine of its own | sharded by ZeRO-3, else whole |

Adapters on one base share its weights where `DataParallel` or ZeRO below stage 3 is used. FSDP2 and ZeRO-3 shard each of
the models by itself.
"""

from __future__ import annotations

import contextlib
import copy
import os
import types
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, fsdp2_prepare_model
from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .logps import num_chunks, rope_boundary

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .second_model import SecondModel


def make_backend(second: SecondModel, accelerator: Accelerator) -> DataParallel:
    """
    The backend for the way in which `accelerator` distributes the policy.

    Raises:
        NotImplementedError: FSDP was asked for, and accelerate has left it out.
    """
    # accelerate sets the variable, too, where it is given a plugin
    wants_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wants_fsdp and accelerator.distributed_type != DistributedType.FSDP:
        raise NotImplementedError(
            f"fsdp, or accelerate's configuration, asks for FSDP, but accelerate does not shard on {accelerator.device.type}: "
            "each process would train whole models. Leave fsdp out; on a CPU, --accelerate_config cpu starts several processes."
        )
    kinds = {DistributedType.FSDP: FullyShard, DistributedType.DEEPSPEED: ZeRO}
    return kinds.get(accelerator.distributed_type, DataParallel)(second, accelerator)


def unshared(model: nn.Module) -> nn.Module:
    """A copy that shares no weights with the model, whole on every process even if ZeRO-3 shards the model."""
    sharded = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not sharded:
        return copy.deepcopy(model)
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        return copy.deepcopy(model)


class DataParallel:
    """
    The whole model on every process.

    Args:
        second ([`~trl_prime.implicit_prm.second_model.SecondModel`]): The PRM, or another model that is trained beside the policy.
            It and its reference are moved to the device.
        accelerator ([`~accelerate.Accelerator`]): Of the trainer.

    Attributes:
        model (`nn.Module`): What computes the loss; a wrapper around `second.model` where gradients are exchanged.
        forward_is_collective (`bool`): Whether a forward pass is a joint act of all processes, so that all need as many of them.
        optimizer_is_sharded (`bool`): Whether each process holds its own part of the optimizer's state.
    """

    forward_is_collective = False
    optimizer_is_sharded = False

    def __init__(self, second: SecondModel, accelerator: Accelerator):
        self.second = second
        self.accelerator = accelerator
        self.model: nn.Module = second.model
        self.optimizer: torch.optim.Optimizer | None = None

    def place(self) -> None:
        """Bring both models to where they compute. Called once, before the first forward pass."""
        self.second.model.to(self.accelerator.device)
        self.place_reference()

    def place_reference(self) -> None:
        """Bring the reference alone to where it computes, for a PRM that a trainer places by itself."""
        if self.second.reference is not None:
            self.second.reference.to(self.accelerator.device)

    def num_passes(self, rows: torch.Tensor) -> int:
        """
        Forward passes that all processes must make, where a pass is a joint act of all; 0 where each is free.

        Args:
            rows (`torch.Tensor`): `(B,)` bool, the rows that this process scores.
        """
        if not self.forward_is_collective:
            return 0
        num_rows = int(self.accelerator.gather(rows.sum().view(1)).max())
        return num_chunks(num_rows, self.second.micro_batch_size, rope_boundary(self.second.model))

    def prepare(self, make_optimizer: Any, max_grad_norm: float | None) -> torch.optim.Optimizer:
        """
        Make the model ready for training.

        Args:
            make_optimizer (`Callable[[nn.Module], torch.optim.Optimizer]`): Makes the optimizer of a model.
            max_grad_norm (`float`, *optional*): Gradients are clipped to this norm.

        Returns:
            `torch.optim.Optimizer`: the optimizer that learning-rate schedules act on.
        """
        self.max_grad_norm = max_grad_norm or float("inf")
        self.model = self.accelerator.prepare_model(self.second.model)
        # Bare: accelerate's wrapper does nothing while the policy accumulates gradients
        self.optimizer = make_optimizer(self.second.model)
        return self.optimizer

    @contextlib.contextmanager
    def micro_batch(self, last: bool):
        """Around forward and backward pass of one micro-batch; gradients are exchanged with the last."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of `loss`, which is this process's part of a sum over all of them."""
        # The exchange takes the mean
        (loss * self.accelerator.num_processes).backward()

    def step(self) -> float:
        """Clip and step, unless the gradient is not finite; its norm before clipping, the same on all processes."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if norm < float("inf"):  # NaN is not
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def optimizer_state(self) -> dict[str, Any]:
        """State of the optimizer, as far as it is on this process."""
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)

    def save_checkpoint(self, folder: str) -> None:
        """Save what only all processes together can save."""

    def load_checkpoint(self, folder: str) -> bool:
        """Load what [`save_checkpoint`] saved; whether that was weights and optimizer."""
        return False

    def full_weights(self, model: nn.Module) -> dict[str, torch.Tensor] | None:
        """
        Weights to save; called by all processes. Of a PeftModel at least the adapter's.

        Returns:
            `dict[str, torch.Tensor]`: on the main process; None means that the model has them itself.
        """
        return None

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Load weights by name, all or an adapter's, the same on every process."""
        _load(self.second.model, weights)


def _load(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    missing, unexpected = model.load_state_dict(weights, strict=False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    if unexpected or trainable & set(missing):
        raise ValueError(
            f"The saved weights do not fit the model: {sorted(trainable & set(missing))[:3]} are missing and "
            f"{unexpected[:3]} unknown. Was the checkpoint made with another prm_model, prm_peft_config or peft_config?"
        )


class FullyShard(DataParallel):
    """The model and its reference sharded by FSDP2, as accelerate shards the policy."""

    forward_is_collective = True
    optimizer_is_sharded = True

    def __init__(self, second: SecondModel, accelerator: Accelerator):
        super().__init__(second, accelerator)
        if accelerator.state.fsdp_plugin.fsdp_version == 1:
            raise NotImplementedError(
                "PRIMETrainer needs FSDP2, but this is FSDP version 1. Set `version: 2` in fsdp_config, or `fsdp_version: 2` "
                "in accelerate's configuration."
            )

    def place(self) -> None:
        self._shard(self.second.model)
        self.place_reference()

    def place_reference(self) -> None:
        if self.second.reference is not None:
            self._shard(self.second.reference)

    def _shard(self, model: nn.Module) -> None:
        fsdp2_prepare_model(self.accelerator, model)
        model.register_forward_hook(_reshard_after_scoring)

    def prepare(self, make_optimizer: Any, max_grad_norm: float | None) -> torch.optim.Optimizer:
        self.max_grad_norm = max_grad_norm or float("inf")
        self.optimizer = make_optimizer(self.second.model)
        return self.optimizer

    @contextlib.contextmanager
    def micro_batch(self, last: bool):
        self.model.set_requires_gradient_sync(last)
        yield

    def optimizer_state(self) -> dict[str, Any]:
        return _map_tensors(self.optimizer.state_dict(), lambda t: t.to_local() if isinstance(t, DTensor) else t)

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
        # The state of a sharded parameter is sharded like it
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                local = parameter.to_local() if isinstance(parameter, DTensor) else None
                if local is not None and isinstance(value, torch.Tensor) and value.shape == local.shape:
                    values[name] = DTensor.from_local(
                        value,
                        parameter.device_mesh,
                        parameter.placements,
                        shape=parameter.shape,
                        stride=parameter.stride(),
                    )

    def full_weights(self, model: nn.Module) -> dict[str, torch.Tensor] | None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(model, options=options)

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(self.second.model, weights, options=options)


def _reshard_after_scoring(model: nn.Module, inputs: Any, outputs: Any) -> None:
    """
    Shard again what FSDP2 keeps whole on every process from the end of a forward pass until the backward pass.

    A pass that scores has no backward pass: the head of the reference would stay whole for the rest of the run.
    """
    if not torch.is_grad_enabled():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _map_tensors(value: Any, function: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_tensors(item, function) for item in value]
    return value


class ZeRO(DataParallel):
    """The model in a DeepSpeed engine of its own, with the policy's settings."""

    optimizer_is_sharded = True

    def __init__(self, second: SecondModel, accelerator: Accelerator):
        super().__init__(second, accelerator)
        self.config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
        self.stage = self.config.get("zero_optimization", {}).get("stage", 0)
        self.forward_is_collective = self.stage == 3
        self.last = True

    def place_reference(self) -> None:
        from trl.models import prepare_deepspeed

        if self.config.get("bf16", {}).get("enabled") is True:
            # An engine rounds its model. If only one of the two were rounded, their difference would be a reward out of nothing.
            for model in (self.second.model, self.second.reference):
                if model is not None and not any(hasattr(p, "ds_id") for p in model.parameters()):
                    model.bfloat16()
        if self.second.reference is not None and self.stage == 3:
            prepare_deepspeed(self.second.reference, self.accelerator)
        else:
            super().place_reference()

    def prepare(self, make_optimizer: Any, max_grad_norm: float | None) -> torch.optim.Optimizer:
        import deepspeed

        # Batch sizes, schedule and optimizer of the configuration are the policy's
        for name in ("optimizer", "scheduler", "train_batch_size"):
            self.config.pop(name, None)
        self.config |= {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_grad_norm or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        optimizer = make_optimizer(self.second.model)
        self.skips = _skip_infinite_steps(optimizer)
        self.model, self.optimizer, *_ = deepspeed.initialize(
            model=self.second.model, optimizer=optimizer, config=self.config
        )
        return optimizer

    @contextlib.contextmanager
    def micro_batch(self, last: bool):
        self.last = last
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        self.model.backward(loss * self.accelerator.num_processes, scale_wrt_gas=False)
        if not self.last:
            self.model.step()  # counts the micro-batch

    def step(self) -> float:
        self.skips.clear()
        self.model.step()
        norm = self.model.get_global_grad_norm()
        return float("nan") if self.skips or norm is None else float(norm)

    def optimizer_state(self) -> dict[str, Any]:
        return {}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        pass  # with `load_checkpoint`

    def save_checkpoint(self, folder: str) -> None:
        self.model.save_checkpoint(os.path.join(folder, "prm_deepspeed"), tag="prm", exclude_frozen_parameters=True)

    def load_checkpoint(self, folder: str) -> bool:
        path, _ = self.model.load_checkpoint(
            os.path.join(folder, "prm_deepspeed"), tag="prm", load_module_strict=False, load_lr_scheduler_states=False
        )
        if path is None:
            raise FileNotFoundError(f"'{folder}' has no DeepSpeed state of the PRM: it cannot be resumed from.")
        return True

    def full_weights(self, model: nn.Module) -> dict[str, torch.Tensor] | None:
        if self.stage != 3:
            return None
        import deepspeed

        weights = {}
        state = model.state_dict(keep_vars=True)
        for name, tensor in state.items():
            if isinstance(model, PeftModel) and not tensor.requires_grad:
                continue  # the base is not saved
            with deepspeed.zero.GatheredParameters([tensor] if hasattr(tensor, "ds_id") else []):
                if self.accelerator.is_main_process:
                    weights[name] = tensor.detach().cpu().clone()
        return weights


def _skip_infinite_steps(optimizer: torch.optim.Optimizer) -> list[bool]:
    """Make an optimizer leave out steps whose gradients are not finite on any process; the list tells of them."""
    skips: list[bool] = []
    step = optimizer.step

    def guarded(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
        device = gradients[0].device if gradients else None
        flag = torch.tensor(float(finite), device=device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        if not flag:
            skips.append(True)
            return None
        return step(*args, **kwargs)

    optimizer.step = types.MethodType(guarded, optimizer)  # schedulers look for a bound method
    return skips
