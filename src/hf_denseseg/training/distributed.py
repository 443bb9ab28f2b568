"""Training one model in several processes: synchronized BatchNorm, and the settings of FSDP."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from hf_denseseg.errors import InputError
from hf_denseseg.training.arguments import TaskTrainingArguments


class _SumOverProcesses(torch.autograd.Function):
    """Sum a tensor over all processes, and its gradient as well."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with the statistics of all processes, for CPUs; `torch.nn.SyncBatchNorm` takes CUDA tensors only."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize `(B, C, H, W)` by mean and variance over the images of all processes."""
        if not self.training:
            return super().forward(input)
        maps = input.float()
        count = torch.tensor(float(maps.numel() // maps.shape[1]))  # B * H * W, which may differ between processes
        dist.all_reduce(count)
        mean = _SumOverProcesses.apply(maps.sum((0, 2, 3))) / count  # (C,)
        centered = maps - mean[:, None, None]
        variance = _SumOverProcesses.apply(centered.square().sum((0, 2, 3))) / count
        if self.track_running_stats:  # with the unbiased variance, as torch does
            self._update_statistics(mean.detach(), variance.detach() * count / (count - 1))
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            return (centered * (scale * self.weight)[:, None, None] + self.bias[:, None, None]).to(input.dtype)
        return (centered * scale[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _update_statistics(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


def sync_batch_norms(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Make every BatchNorm of a model compute its statistics over all processes; weights and names do not change."""
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm2d
    return model


def prepare_fsdp(accelerator: Any, args: TaskTrainingArguments, model: PreTrainedModel) -> None:
    """Choose the modules that FSDP shards, and refuse settings that do not work with it.

    Raises:
        InputError: FSDP is enabled without accelerators, in version 1, with sharded checkpoints or with averaged
            weights.
    """
    is_enabled = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" or bool(args.fsdp)
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if not is_enabled and plugin is None:
        return
    if plugin is None:  # accelerate would silently train with DDP
        raise InputError(
            "FSDP is enabled, but accelerate does not shard models on a CPU. Use scripts/accelerate/cpu.yaml."
        )
    if plugin.fsdp_version != 2:
        raise InputError("FSDP version 1 is not supported: set `fsdp_version: 2` in the accelerate configuration.")
    if "FULL" not in str(plugin.state_dict_type):
        raise InputError(
            f"Sharded checkpoints ({plugin.state_dict_type}) cannot be opened with `from_pretrained`: set "
            "`fsdp_state_dict_type: FULL_STATE_DICT` in the accelerate configuration."
        )
    if args.lora_rank is not None:
        raise InputError("lora_rank does not work with FSDP: take it out of the recipe, or train with DDP.")
    if args.ema_decay is not None:
        raise InputError("ema_decay does not work with FSDP: take it out of the recipe, or train with DDP.")
    if plugin.transformer_cls_names_to_wrap is None:
        # accelerate refuses names of classes that do not occur in the model, such as those of other variants.
        present = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(set(model._no_split_modules or ()) & present)
    # accelerate would also shard the input embeddings, which are part of a sharded module or used without a call.
    setattr(model, "get_input_embeddings", lambda: None)  # noqa: B010


def unsharded_copy(model: nn.Module, device: torch.device) -> PreTrainedModel:
    """An unsharded copy of a model that FSDP has sharded, on every process; all processes must call this."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    kind: Any = next(each for each in type(model).__mro__ if not each.__name__.startswith("FSDP"))
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and replaced below
        copy = kind(model.config)
    copy.load_state_dict(weights)
    copy = copy.to(device).eval()
    for buffer in copy.buffers():  # BatchNorm statistics may differ; use those of rank 0
        dist.broadcast(buffer, 0)
    return copy
