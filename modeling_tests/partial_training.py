"""Contract of models whose encoder is frozen, or has adapters, in a run: what learns, what stays, what is saved."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from transformers import PreTrainedModel

from hf_denseseg.training.adaptation import adapt, load_adapter, merged_state, save_adapter, still_modules
from hf_denseseg.training.optimization import encoder_prefix, parameter_groups
from weight_use import assert_agree, predict


def train_two_steps(model: PreTrainedModel, args: Any, batch: dict[str, Any]) -> None:
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.01)
    optimizer = torch.optim.SGD(groups)
    model.train()
    for module in still_modules(model, args):
        module.eval()
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()


def parts(state: dict[str, torch.Tensor], model: PreTrainedModel) -> tuple[set[str], set[str]]:
    """Names inside the encoder, and outside."""
    inner = {name for name in state if name.startswith(encoder_prefix(model) + ".")}
    return inner, set(state) - inner


def check_frozen_encoder(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    """Weights and statistics of the encoder stay as they are, and everything else that learns does."""
    args = SimpleNamespace(freeze="encoder", lora_rank=None)
    before = copy.deepcopy(model.state_dict())
    adapt(model, args)
    grouped = {
        name for group in parameter_groups(model, learning_rate=0.1, weight_decay=0.0) for name in group["names"]
    }
    train_two_steps(model, args, batch)
    after = model.state_dict()
    inner, outer = parts(before, model)
    assert inner and outer and grouped == {name for name, _ in model.named_parameters()} & outer
    assert not [name for name in inner if not torch.equal(before[name], after[name])]
    assert {name for name in outer if not torch.equal(before[name], after[name])} & grouped


def check_adapters(model: PreTrainedModel, batch: dict[str, Any], folder: Path) -> None:
    """Adapters start as no change, all of them learn, and they merge and load to the same outputs; in float64."""
    args = SimpleNamespace(freeze=None, lora_rank=2, lora_alpha=4, lora_target_modules=None)
    pixel_values = batch["pixel_values"]
    plain, expected = copy.deepcopy(model), predict(model, pixel_values)
    torch.manual_seed(0)
    adapt(model, args)
    assert_agree(predict(model, pixel_values), expected, "adapted, not trained")
    start = copy.deepcopy(model.state_dict())
    train_two_steps(model, args, batch)
    trained, adapted = model.state_dict(), predict(model, pixel_values)
    inner, _ = parts(start, model)
    lora = {name for name in inner if ".lora_" in name}
    silent = [name for name, each in model.named_parameters() if name in lora and each.grad is None]
    if silent:  # BEiT does not use its last layer
        whole = copy.deepcopy(plain).train()
        whole(**batch).loss.backward()
        used = {name.removesuffix(".weight") for name, each in whole.named_parameters() if each.grad is not None}
        silent = [name for name in silent if name.partition(".lora_")[0] in used]
    assert not silent, f"no gradient reaches {silent[:5]}"
    # In a window of one position keys have no effect, so that their gradient is 0 here and there.
    assert sum(not torch.equal(start[name], trained[name]) for name in lora) > len(lora) / 2
    assert not [name for name in inner - lora if not torch.equal(start[name], trained[name])]
    merged = copy.deepcopy(plain)
    merged.load_state_dict(merged_state(model))  # strict: the names are those of the plain model
    assert_agree(predict(merged, pixel_values), adapted, "merged")
    save_adapter(model, folder)
    loaded = copy.deepcopy(plain)
    adapt(loaded, args)
    load_adapter(loaded, folder)
    assert_agree(predict(loaded, pixel_values), adapted, "loaded")
    read = peft.PeftModel.from_pretrained(plain, folder).merge_and_unload().eval()
    assert_agree(predict(read, pixel_values), adapted, "read and merged by peft")
