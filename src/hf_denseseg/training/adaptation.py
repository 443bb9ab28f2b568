"""Train a part of a model: a frozen encoder, or low-rank adapters (LoRA, Hu et al., ICLR 2022) in it."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_denseseg.errors import InputError
from hf_denseseg.models.auto.peers import PEERS
from hf_denseseg.models.auto.registration import list_models
from hf_denseseg.training.arguments import ModelArguments, TaskTrainingArguments
from hf_denseseg.training.optimization import encoder_prefix

ADAPTER, PEFT_PREFIX = "default", "base_model.model."
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # the name that peft gives it


def check_adaptation(arguments: ModelArguments, args: TaskTrainingArguments) -> None:
    """Refuse keys that cannot have their effect, before anything is loaded.

    Raises:
        InputError: an unknown part, an encoder with random weights, a rank below 1, or keys that exclude each other.
    """
    if args.freeze not in (None, "encoder"):
        raise InputError(f"freeze is {args.freeze!r}: the part that can be frozen is 'encoder'.")
    lora = {"lora_alpha": args.lora_alpha, "lora_target_modules": args.lora_target_modules}
    if args.lora_rank is None:
        if alone := [key for key, value in lora.items() if value is not None]:
            raise InputError(f"{' and '.join(alone)}: give --lora_rank too, such as 8.")
        if args.freeze is None:
            return
    key = "freeze: encoder" if args.lora_rank is None else "lora_rank"
    if args.lora_rank is not None:
        if args.lora_rank < 1 or (args.lora_alpha is not None and args.lora_alpha <= 0):
            raise InputError(f"lora_rank is {args.lora_rank}, lora_alpha {args.lora_alpha}: give numbers from 1 up.")
        if args.freeze is not None:
            raise InputError("lora_rank freezes the weights of the encoder already: leave out `freeze`.")
        if importlib.util.find_spec("peft") is None:
            raise InputError("lora_rank needs peft: `pip install 'hf-denseseg[peft]'`, or leave it out.")
    if args.layer_decay is not None:
        raise InputError(
            f"layer_decay scales the learning rates of the encoder, which {key} freezes: give one of them."
        )
    if arguments.encoder_weights is None and arguments.model in {*list_models(), *PEERS}:
        raise InputError(
            f"{key}: the encoder of {arguments.model} would keep its random weights. Give encoder_weights, or the "
            "folder or hub id of a trained model as --model."
        )


def encoder_of(model: nn.Module) -> nn.Module:
    """The pre-trained part of a model, as the parameter groups find it."""
    return model.get_submodule(encoder_prefix(model))


def adapt(model: PreTrainedModel, args: TaskTrainingArguments) -> None:
    """Freeze the encoder, or freeze it and put adapters in, in place; the rest of the model trains fully.

    Raises:
        InputError: `lora_target_modules` names no layer of the encoder that can have an adapter.
    """
    if args.lora_rank is not None:
        from peft import LoraConfig, inject_adapter_in_model

        targets = list(_targets(model, args.lora_target_modules))
        settings = LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha or args.lora_rank, target_modules=targets)
        inject_adapter_in_model(settings, model, ADAPTER)
        for name in targets:  # MobileNetV2 pads by the stride and kernel of its convolutions
            layer: Any = model.get_submodule(name)
            for kind in ("kernel_size", "stride", "dilation"):
                if hasattr(layer.base_layer, kind):
                    setattr(layer, kind, getattr(layer.base_layer, kind))
        inner = encoder_prefix(model) + "."
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(inner) or ".lora_" in name)
    elif args.freeze is not None:
        encoder_of(model).requires_grad_(False)


def still_modules(model: nn.Module, args: TaskTrainingArguments) -> list[nn.Module]:
    """Modules that stay in eval mode: the frozen encoder, or its BatchNorms if it has adapters."""
    if args.freeze is not None:
        return [encoder_of(model)]
    if args.lora_rank is None:
        return []
    return [each for each in encoder_of(model).modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]


def _targets(model: nn.Module, given: list[str] | None) -> Iterator[str]:
    """Names of the layers that get an adapter.

    By default all linear layers of the encoder; without any, its convolutions that are neither grouped nor dilated,
    which are those that peft can adapt and merge.
    """
    encoder, inner = encoder_of(model), encoder_prefix(model) + "."
    linear = [name for name, each in encoder.named_modules() if isinstance(each, nn.Linear)]
    convolutions = [
        name
        for name, each in encoder.named_modules()
        if isinstance(each, nn.Conv2d) and each.groups == 1 and max(each.dilation) == 1
    ]
    chosen = linear or convolutions
    if given is not None:
        every = [*linear, *convolutions]
        for part in given:
            if not any(f".{name}".endswith(f".{part}") for name in every):
                known = ", ".join(sorted({name.rpartition(".")[2] for name in every}))
                raise InputError(
                    f"lora_target_modules: {part!r} is no linear layer and no plain convolution of the encoder of "
                    f"{type(model).__name__} (the rest trains fully). Its layers end in {known}."
                )
        chosen = [name for name in every if any(f".{name}".endswith(f".{part}") for part in given)]
    yield from (inner + name for name in chosen)


def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """State of the model without adapters that gives the same outputs: `W + alpha / r * B A` in place of W."""
    layers = dict(model.named_modules())
    state = {}
    for key, value in model.state_dict().items():
        owner, inside, kind = key.rpartition(".base_layer.")
        if inside:
            key = f"{owner}.{kind}"
            if kind == "weight":
                delta: Any = layers[owner].get_delta_weight(ADAPTER)
                value = value + delta.to(value.dtype)
        if ".lora_" not in key:
            state[key] = value
    return state


def save_adapter(model: Any, folder: Path) -> None:
    """Write what is trained as peft does: the adapters, and everything outside the encoder.

    `PeftModel.from_pretrained(model_without_adapters, folder)` reads it; the configuration names no base model.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    inner = encoder_prefix(model) + "."
    trained = {
        PEFT_PREFIX + name.replace(f".{ADAPTER}.", "."): value.contiguous()
        for name, value in model.state_dict().items()
        if ".lora_" in name or not name.startswith(inner)
    }
    save_file(trained, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    model.peft_config[ADAPTER].save_pretrained(str(folder))


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Read a folder that `save_adapter` wrote into a model with such adapters."""
    from safetensors.torch import load_file

    state = {}
    for key, value in load_file(folder / ADAPTER_WEIGHTS).items():
        owner, inside, kind = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        name, _, rest = kind.partition(".")  # A.weight
        state[f"{owner}.lora_{name}.{ADAPTER}.{rest}" if inside else kind] = value
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise InputError(
            f"{folder} was saved with other adapters ({', '.join(unexpected[:3])}). Give the same lora_rank and "
            "lora_target_modules, or another --output_dir."
        )


__all__ = ["adapt", "check_adaptation", "load_adapter", "merged_state", "save_adapter", "still_modules"]
