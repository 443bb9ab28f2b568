"""How the layers recorded from the authors' TensorFlow code (channels last) are found in our HFGD."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import hf_denseseg

INPUTS = ("inputs", "inputs_0", "inputs_1", "inputs_2", "inputs_3", "labels", "upstream")


def tolerance(name: str, expected: torch.Tensor) -> float:
    """Section 11 of the specification: relative 1e-5, gradients 1e-4; labels exactly."""
    if name in ("labels_resized", "class_counts"):
        return 0.0
    return (1e-4 if name.startswith("grad") else 1e-5) * expected.abs().max().item()


def run_case(folder: Path, config: dict[str, Any], inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Load a layer, run it, and return what we compute under the recorded names."""
    layer = hf_denseseg.load_official("hfgd", folder / "weights.safetensors", folder / "config.json")
    run = {
        "class_aware_regularization": run_regularization,
        "car_self_attention_head": run_head,
        "semantic_fpn": run_pyramid,
    }.get(config["module"], run_attention)
    with torch.enable_grad():
        return run(layer, config, inputs)


def run_attention(layer: nn.Module, config: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    features = channels_first(inputs["inputs"]).requires_grad_()
    outputs = channels_last(layer(features))
    (outputs * inputs["upstream"]).sum().backward()
    return {"outputs": outputs, "grad_inputs": channels_last(features.grad)}


def run_pyramid(layer: nn.Module, config: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    *low, top = (channels_first(inputs[f"inputs_{level}"]) for level in range(4))
    found = {f"pyramid_{level}": channels_last(each) for level, each in enumerate(layer.pyramid(low, top))}
    return found | {"outputs": channels_last(layer(low, top, (4 * low[0].shape[2], 4 * low[0].shape[3])))}


def run_regularization(layer: nn.Module, config: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    labels = inputs["labels"]
    labels = torch.where(labels == config["ignore_label"], 255, labels - config["label_base"])
    linear = layer["linear"](channels_first(inputs["inputs"]))
    found = {"linear_output": channels_last(linear), "outputs_eval": channels_last(layer["project"](linear))}
    layer.train()
    found["outputs_train"] = channels_last(layer["project"](linear))
    regularization = layer["regularization"]
    resized = regularization.resize_labels(labels, linear.shape[-2:])
    found["labels_resized"] = torch.where(resized == 255, config["ignore_label"], resized + config["label_base"])
    found["class_centers"], found["class_counts"] = regularization.centers(linear, labels)
    found |= losses(layer, lambda features: regularization(layer["linear"](features), labels), inputs["inputs"])
    if config["use_last_class_center"]:
        found["last_class_center_after"] = regularization.class_centers
    return found


def run_head(layer: nn.Module, config: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from hf_denseseg import HfgdConfig
    from hf_denseseg.models.hfgd.regularization_hfgd import HfgdClassAwareRegularization

    features = channels_first(inputs["inputs"])
    found = {"outputs_eval": channels_last(layer(features)[0])}
    layer.train()
    found["outputs_train"] = channels_last(layer(features)[0])
    settings = HfgdConfig(num_labels=config["num_classes"], align_corners=False)
    regularization = HfgdClassAwareRegularization(settings, config["mid_channels"])
    return found | losses(
        layer, lambda features: regularization(layer(features)[1], inputs["labels"]), inputs["inputs"]
    )


def losses(layer: nn.Module, run: Any, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The losses of CAR and their gradients, under the recorded names."""
    features = channels_first(inputs).requires_grad_()
    found = run(features)
    sums = {"inter": found["car_c2c"] + found["car_c2p"], "intra": found["car_intra"]}
    named = {"loss_c2c": found["car_c2c"][None], "loss_c2p": found["car_c2p"][None]}
    for name, loss in sums.items():
        (gradient,) = torch.autograd.grad(loss, features, retain_graph=True)
        named[f"loss_{name}_r1"] = loss[None]
        named[f"grad_inputs_{name}_r1"] = channels_last(gradient)
    return named


def channels_first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(0, 3, 1, 2).contiguous()


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(0, 2, 3, 1)
