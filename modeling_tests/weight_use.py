"""Does a model use every weight through the module that owns it? What offloading, adapters and hooks rely on."""

import copy
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from accelerate import cpu_offload
from closeness import assert_same_outputs

SCALE = 1.05  # of computed weights


@torch.no_grad()
def predict(model: nn.Module, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """All floating tensors of an output without labels."""
    outputs: ModelOutput = model(pixel_values=pixel_values)
    found = [each for each in outputs.values() if isinstance(each, torch.Tensor) and each.is_floating_point()]
    assert found and all(each.abs().sum() > 0 for each in found)
    return found


def assert_agree(found: list[torch.Tensor], expected: list[torch.Tensor], name: str) -> None:
    """Equal but for the rounding of another order of operations, such as a BatchNorm that is not folded."""
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape, name
        difference, largest = float((one - other).abs().max()), float(other.abs().max())
        assert difference <= 1e-5 * largest, f"{name}: {difference:.3g} of {largest:.3g}"


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with parameters of their own."""
    return {name: each for name, each in model.named_modules() if any(True for _ in each.parameters(recurse=False))}


def check_offloading(model: PreTrainedModel, pixel_values: torch.Tensor, folder: Path) -> None:
    """From the disk and from CPU memory, each module's weights are there only while its `forward` runs."""
    expected = predict(model, pixel_values)
    model.save_pretrained(folder / "model")
    from_disk = type(model).from_pretrained(
        folder / "model", device_map={"": "disk"}, offload_folder=str(folder / "offload")
    )
    assert {each.device.type for each in from_disk.parameters()} == {"meta"}
    assert_agree(predict(from_disk.eval(), pixel_values), expected, "from the disk")
    offloaded = copy.deepcopy(model)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert_agree(predict(offloaded, pixel_values), expected, "from CPU memory")


def adaptable(model: nn.Module) -> list[str]:
    """Layers that LoRA can adapt; peft cannot merge into grouped convolutions and loses the dilation of others."""
    return [
        name
        for name, each in model.named_modules()
        if isinstance(each, nn.Linear)
        or (isinstance(each, nn.Conv2d) and each.groups == 1 and max(each.dilation) == 1)
    ]


def check_lora(model: PreTrainedModel, batch: dict[str, Any], folder: Path) -> None:
    """Adapters on every layer learn, merge to the same outputs, and load to the same outputs."""
    names = adaptable(model)
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=names, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(copy.deepcopy(model), settings).eval()
    found = predict(adapted, batch["pixel_values"])
    adapted.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    assert_same_outputs(predict(loaded, batch["pixel_values"]), found, "loaded")
    adapted.train()(**batch).loss.backward()
    untouched = [name for name, each in adapted.named_parameters() if "lora_" in name and each.grad is None]
    assert not untouched, f"no gradient reaches {untouched[:5]}"
    merged = copy.deepcopy(adapted.eval()).merge_and_unload()
    expected, found = (predict(each, batch["pixel_values"]) for each in (adapted, merged))
    assert_agree(found, expected, "merged")
    changed = predict(model, batch["pixel_values"])[0]
    assert changed.shape != found[0].shape or not torch.allclose(changed, found[0], atol=1e-3)


class Scaled(nn.Module):
    """A weight that is computed from another."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return SCALE * weight


def check_parametrized_weights(model: PreTrainedModel, pixel_values: torch.Tensor) -> None:
    """Weights that are computed when they are asked for count as if they were stored."""
    stored, computed = copy.deepcopy(model), copy.deepcopy(model)
    for name, module in owners(model).items():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            stored.get_submodule(name).weight.data.mul_(SCALE)
            parametrize.register_parametrization(computed.get_submodule(name), "weight", Scaled())
    assert_agree(predict(computed, pixel_values), predict(stored, pixel_values), "computed weights")


def silent_modules(model: PreTrainedModel, batch: dict[str, Any]) -> set[str]:
    """Modules with weights whose forward hooks a step with labels does not call."""
    names, called = owners(model), set()
    for name, module in names.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(**batch)
    return set(names) - called


def randomize_running_statistics(model: nn.Module) -> None:
    """Statistics as of a trained model, so that a BatchNorm that is left out or applied twice shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.2)
