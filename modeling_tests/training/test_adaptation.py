"""Runs that train a part of a model: adapters (`lora_rank`), or the heads beside a frozen encoder (`freeze`)."""

import importlib.util
import json
import shutil
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_training import WORDS, assert_same_weights, weights
from transformers import AutoModelForSemanticSegmentation, pipeline

import transformers_models
from closeness import assert_same_outputs
from hf_denseseg import create_image_processor, create_model
from hf_denseseg.cli import main
from hf_denseseg.data.synthetic.scenes import SYNTHETIC_SPEC
from hf_denseseg.errors import InputError
from hf_denseseg.training import run as training_run
from hf_denseseg.training.recipe import load_recipe
from test_published_dsct import REDUCED

SHORT = [*WORDS[2:], "--max_train_samples", "8", "--max_eval_samples", "2", "--max_steps", "4", "--save_steps", "2"]
LORA = [*SHORT, "--lora_rank", "2", "--ema_decay", "0.5"]
NAMES = {"id2label": SYNTHETIC_SPEC.id2label, "label2id": SYNTHETIC_SPEC.label2id}


@pytest.fixture(scope="module", params=["dsct", "segformer"])
def checkpoint(request, tmp_path_factory):
    """A trained model of ours, and one of transformers whose file holds former names of weights."""
    folder = tmp_path_factory.mktemp("start") / request.param
    if request.param == "segformer":
        return transformers_models.save("segformer", folder)
    torch.manual_seed(0)
    model = create_model("dsct-tiny-sac", **NAMES, **REDUCED)
    model.save_pretrained(folder)
    create_image_processor(model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(checkpoint):
    output = checkpoint.parent / "run"
    return output, train(checkpoint, output, *LORA)


def train(checkpoint, output, *words):
    return training_run.train(load_recipe(None, ["--model", str(checkpoint), *words, "--output_dir", str(output)]))


def test_checkpoints_hold_the_adapter_and_the_model_is_merged(checkpoint, trained, tmp_path):
    output, results = trained
    names = {path.name for path in (output / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "ema.safetensors"} <= names
    assert "model.safetensors" not in names
    model = AutoModelForSemanticSegmentation.from_pretrained(output / "model")
    assert results["parameters"] == model.num_parameters() and not hasattr(model, "peft_config")
    before, after = (load_file(each / "model.safetensors") for each in (checkpoint, output / "model"))
    assert before.keys() == after.keys()
    evaluate = ["evaluate", str(output / "model"), "--dataset", "synthetic@64x96", "--max_eval_samples", "2"]
    assert main([*evaluate, "--output_dir", str(tmp_path / "scores")]) == 0
    again = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert again["scores"]["mean_iou"] == pytest.approx(results["scores"]["mean_iou"], abs=1e-3)
    Image.new("RGB", (96, 64), (90, 120, 60)).save(tmp_path / "a.png")
    assert main(["predict", str(output / "model"), str(tmp_path / "a.png"), "--output_dir", str(tmp_path / "p")]) == 0
    found = pipeline("image-segmentation", str(output / "model"), device="cpu")(str(tmp_path / "a.png"))
    assert {each["label"] for each in found} <= set(SYNTHETIC_SPEC.classes)
    assert "lora_rank: 2" in (output / "model" / "README.md").read_text()


def test_peft_reads_the_adapter_into_the_model_it_started_from(checkpoint, trained):
    import peft

    base = AutoModelForSemanticSegmentation.from_pretrained(checkpoint, **NAMES, ignore_mismatched_sizes=True)
    adapted = peft.PeftModel.from_pretrained(base, trained[0] / "model" / "adapter").eval()
    merged = AutoModelForSemanticSegmentation.from_pretrained(trained[0] / "model").eval()
    pixel_values = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = adapted(pixel_values=pixel_values).logits, merged(pixel_values=pixel_values).logits
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    assert_same_outputs(adapted(pixel_values=pixel_values).logits, found)


@pytest.mark.parametrize("part", ["adapter", "encoder"])
def test_an_interrupted_run_continues_to_the_same_weights(checkpoint, trained, tmp_path, part):
    words = LORA if part == "adapter" else [*SHORT, "--freeze", "encoder"]
    output = trained[0] if part == "adapter" else tmp_path / "whole"
    if part == "encoder":
        train(checkpoint, output, *words)
    shutil.copytree(output, tmp_path / "again")
    (tmp_path / "again" / "results.json").unlink()
    for name in ("checkpoint-4", "model"):
        shutil.rmtree(tmp_path / "again" / name)
    assert train(checkpoint, tmp_path / "again", *words)["training"]["resumed_from_step"] == 2
    assert_same_weights(weights(output), weights(tmp_path / "again"))


def test_the_best_checkpoint_of_a_run_with_adapters_is_loaded(checkpoint, tmp_path):
    words = [word for word in SHORT if word not in ("--eval_strategy", "no")]
    results = train(checkpoint, tmp_path, *words, "--lora_rank", "2", "--eval_steps", "2", "--load_best_model_at_end")
    best = max(entry["eval_mean_iou"] for entry in results["history"] if "eval_mean_iou" in entry)
    assert results["scores"]["mean_iou"] == pytest.approx(best, abs=1e-6)


def test_a_frozen_encoder_is_saved_as_it_was(checkpoint, tmp_path):
    train(checkpoint, tmp_path, *SHORT, "--freeze", "encoder", "--head_learning_rate_multiplier", "10")
    before, after = (load_file(each / "model.safetensors") for each in (checkpoint, tmp_path / "model"))
    same = {name for name in before if torch.equal(before[name], after[name])}  # False for other shapes, too
    assert {name for name in before if name.startswith(f"{checkpoint.name}.")} <= same < set(before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--freeze", "encoder"], "the encoder of dsct-tiny-sac would keep its random weights"),
        (
            ["--model", "segformer-b0", "--lora_rank", "2"],
            "lora_rank: the encoder of segformer-b0 would keep",
        ),
        (["--model", "x/y", "--freeze", "head"], "freeze is 'head': the part that can be frozen is 'encoder'"),
        (["--model", "x/y", "--freeze", "encoder", "--lora_rank", "2"], "lora_rank freezes the weights"),
        (["--model", "x/y", "--freeze", "encoder", "--layer_decay", "0.9"], "layer_decay scales"),
        (["--model", "x/y", "--lora_rank", "2", "--layer_decay", "0.9"], "layer_decay scales"),
        (["--model", "x/y", "--lora_rank", "0"], "lora_rank is 0"),
        (["--model", "x/y", "--lora_alpha", "4"], "lora_alpha: give --lora_rank too"),
        (["--task", "object-detection", "--lora_rank", "4"], "lora_rank .* has no meaning in the task"),
    ],
)
def test_keys_that_cannot_have_their_effect_are_refused(words, message, tmp_path):
    with pytest.raises(InputError, match=message):
        training_run.train(load_recipe(None, [*words, "--output_dir", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()


def test_without_peft_adapters_are_refused_before_anything_is_loaded(monkeypatch):
    recipe = load_recipe(None, ["--model", "x/y", "--lora_rank", "2"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"lora_rank needs peft: `pip install 'hf-denseseg\[peft\]'`"):
        training_run.train(recipe)


def test_the_merged_model_is_evaluated_by_its_recipe_without_peft(monkeypatch, trained, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    words = ["evaluate", str(trained[0] / "model"), "--recipe", str(trained[0] / "recipe.yaml")]
    assert main([*words, "--output_dir", str(tmp_path)]) == 0


def test_layers_with_adapters_can_be_chosen_in_the_encoder_alone(checkpoint, tmp_path):
    with pytest.raises(InputError, match="'decode_head' is no linear layer .* Its layers end in "):
        train(checkpoint, tmp_path / "a", *SHORT, "--lora_rank", "2", "--lora_target_modules", "decode_head")
    assert not (tmp_path / "a" / "recipe.yaml").exists()
    train(checkpoint, tmp_path / "b", *SHORT, "--lora_rank", "2", "--lora_target_modules", "fc1", "--lora_alpha", "8")
    saved = load_file(tmp_path / "b" / "model" / "adapter" / "adapter_model.safetensors")
    adapted = {name.partition(".lora_")[0] for name in saved if ".lora_" in name}
    assert adapted and all(name.endswith(".fc1") for name in adapted)
    settings = json.loads((tmp_path / "b" / "model" / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (2, 8)
