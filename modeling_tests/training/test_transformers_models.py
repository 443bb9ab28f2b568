"""Any segmentation model of transformers on the same road: train, evaluate, predict, resume, card."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, SegformerConfig, SegformerModel

import partial_training
import transformers_models
from hf_denseseg.cli import main
from hf_denseseg.data.class_names import ClassNames
from hf_denseseg.data.segmentation import load_segmentation
from hf_denseseg.errors import InputError
from hf_denseseg.inference.preprocessing import Preprocessing
from hf_denseseg.inference.settings import InferenceSettings
from hf_denseseg.models.auto.peers import create_peer
from hf_denseseg.training import run as training_run
from hf_denseseg.training.arguments import ModelArguments
from hf_denseseg.training.optimization import parameter_groups
from hf_denseseg.training.recipe import load_recipe
from hf_denseseg.training.starting_model import build_model
from transformers_models import MODELS

WINDOWS = ("--test_mode", "slide", "--test_crop_size", "64", "64", "--test_stride", "48", "48")
WORDS = [
    *("--dataset", "synthetic@64x96", "--max_train_samples", "8", "--max_eval_samples", "2"),
    *("--crop_size", "64", "64", "--per_device_train_batch_size", "2", "--max_steps", "4", "--save_steps", "2"),
    *("--use_cpu", "--eval_strategy", "no"),
    *WINDOWS,
]


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory):
    return transformers_models.save(request.param, tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def trained(checkpoint):
    output = checkpoint.parent / "run"
    assert main(["train", "--model", str(checkpoint), *WORDS, "--output_dir", str(output)]) == 0
    return output


def trainer_of(checkpoint, output, *words):
    recipe = load_recipe(None, ["--model", str(checkpoint), *WORDS, "--output_dir", str(output), *words])
    data = training_run.load_data(recipe, "train")
    return training_run.build_trainer(recipe, training_run.build_model(recipe.model, data.spec), data, data)


def test_the_trained_model_scores_the_same_when_it_is_evaluated(trained, tmp_path, monkeypatch):
    results = json.loads((trained / "results.json").read_text())
    words = ["--dataset", "synthetic@64x96", "--max_eval_samples", "2", "--output_dir", str(tmp_path)]
    assert main(["evaluate", str(trained / "model"), *words]) == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["protocol"] == results["protocol"] and again["protocol"]["mode"] == "slide"
    assert again["scores"]["mean_iou"] == pytest.approx(results["scores"]["mean_iou"], abs=1e-6)


def test_the_trained_model_predicts_and_loads_without_this_package(trained, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    assert main(["predict", str(trained / "model"), str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / "masks" / "a.png") as mask:
        assert mask.size == (90, 70)
    config = json.loads((trained / "model" / "config.json").read_text())
    assert "auto_map" not in config
    model = AutoModelForSemanticSegmentation.from_pretrained(trained / "model")
    assert model.config.num_labels == len(load_segmentation("synthetic@64x96", "train").spec.classes)
    processor = AutoImageProcessor.from_pretrained(trained / "model")
    assert not processor.do_resize and not getattr(processor, "do_reduce_labels", False)


def test_the_saved_processor_gives_the_pixels_of_training_and_prediction(checkpoint, trained):
    """Of whole images: not cropped, not squeezed, and in the order of channels that the model was made for."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8))
    for folder in (trained / "model", checkpoint):
        processor = AutoImageProcessor.from_pretrained(folder)
        if folder == checkpoint:  # whose processor also resizes and crops
            processor.do_resize = processor.do_center_crop = False
        expected = processor(image, return_tensors="pt").pixel_values[0]
        preprocessing = Preprocessing.from_image_processor(processor)
        torch.testing.assert_close(preprocessing.normalize(pil_to_tensor(image)), expected, atol=1e-5, rtol=0)
    blue = torch.from_numpy(np.array(image))[..., 2] / 255
    assert torch.allclose(expected[0], blue) == checkpoint.name.startswith("mobilevit")


def test_an_interrupted_run_continues_to_the_same_weights(checkpoint, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    for name in ("checkpoint-4", "model"):
        shutil.rmtree(tmp_path / "run" / name)
    assert main(["train", "--model", str(checkpoint), *WORDS, "--output_dir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["training"]["resumed_from_step"] == 2
    first, second = (load_file(each / "model" / "model.safetensors") for each in (trained, tmp_path / "run"))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name], atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_the_card_names_the_model_and_no_folder_of_this_machine(checkpoint, trained):
    card = (trained / "model" / "README.md").read_text()
    assert "of transformers, " in card and "import hf_denseseg" not in card and "bibtex" not in card
    assert str(checkpoint.parent) not in card.partition("```yaml")[0]


def test_the_loss_is_that_of_transformers_with_the_auxiliary_head(checkpoint, tmp_path):
    """On labels without ignored pixels, of which transformers means over the valid ones too."""
    trainer = trainer_of(checkpoint, tmp_path)
    model = trainer.model.train()
    for module in model.modules():  # the two forward passes must draw the same
        if isinstance(module, torch.nn.Dropout | torch.nn.Dropout2d) or "DropPath" in type(module).__name__:
            module.eval()
    random = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(2, 3, 64, 64, generator=random)
    labels = torch.randint(0, model.config.num_labels, (2, 64, 64), generator=random)
    expected = model(pixel_values, labels=labels).loss
    found, _ = trainer.batch_loss(model, {"pixel_values": pixel_values, "labels": labels.to(torch.uint8)})
    torch.testing.assert_close(found, expected)


def test_class_weights_and_crops_without_labels_are_honored(checkpoint, tmp_path):
    trainer = trainer_of(checkpoint, tmp_path, "--class_weights", str([2.0] + [0.0] * 10))
    labels = torch.full((2, 64, 64), 255, dtype=torch.uint8)
    batch = {"pixel_values": torch.randn(2, 3, 64, 64), "labels": labels}
    loss, _ = trainer.batch_loss(trainer.model.train(), batch)
    assert loss.item() == 0
    batch["labels"][:, :32] = 3  # a class of weight 0
    assert trainer.batch_loss(trainer.model, batch)[0].item() == 0
    batch["labels"][:, :32] = 0
    assert trainer.batch_loss(trainer.model, batch)[0].item() > 0


def test_the_head_learns_faster_and_the_encoder_is_found(checkpoint):
    model = transformers_models.build(checkpoint.name)
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.0, head_multiplier=10.0)
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    base = model.base_model_prefix or "backbone"
    assert set(rates.values()) == {1.0, 10.0}
    assert {name for name, rate in rates.items() if rate == 1.0} == {n for n in rates if n.startswith(f"{base}.")}


def test_adapters_and_a_frozen_encoder(checkpoint, tmp_path):
    model = transformers_models.build(checkpoint.name)
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, model.config.num_labels, (2, 64, 64), generator=random)
    batch = {"pixel_values": torch.randn(2, 3, 64, 64, generator=random), "labels": labels}
    partial_training.check_frozen_encoder(transformers_models.build(checkpoint.name), batch)
    batch["pixel_values"] = batch["pixel_values"].double()
    partial_training.check_adapters(model.double(), batch, tmp_path)


def test_a_size_that_the_model_does_not_take_is_refused_before_training(tmp_path):
    """This DPT reads squares only."""
    checkpoint = transformers_models.save("dpt", tmp_path / "dpt")
    words = ["train", "--model", str(checkpoint), *WORDS, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(InputError, match="training crops of 64x96 .* --crop_size"):
        trainer_of(checkpoint, tmp_path / "other", "--crop_size", "64", "96")
    with pytest.raises(InputError, match="64x96 pixels in the mode whole .* --test_mode slide"):
        trainer_of(checkpoint, tmp_path / "other", "--test_mode", "whole")
    assert main([*words, "--crop_size", "64", "96"]) == 2
    assert main(words) == 0  # the refused command does not occupy the folder


@pytest.mark.parametrize(("name", "code"), [("segformer", 0), ("dpt", 1)])
def test_export_works_or_says_why_not(name, code, tmp_path, capsys):
    checkpoint = transformers_models.save(name, tmp_path / name)
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "exported")]) == code
    assert (tmp_path / "exported").exists() == (code == 0)
    assert code == 0 or "cannot be exported for images of any size" in capsys.readouterr().err


@torch.no_grad()
def test_export_of_one_size(tmp_path, capsys):
    """This DPT takes 64x64 pixels only."""
    words = ["export", str(transformers_models.save("dpt", tmp_path / "dpt")), "--output", str(tmp_path / "exported")]
    assert main([*words, "--size", "64", "96"]) == 1
    assert "cannot be exported for images of 64x96 pixels" in capsys.readouterr().err
    assert main([*words, "--size", "0", "64"]) == 2 and not (tmp_path / "exported").exists()
    assert main([*words, "--size", "64", "64"]) == 0
    pixel_values = torch.randn(3, 3, 64, 64)
    (found,) = torch.export.load(tmp_path / "exported" / "model.pt2").module()(pixel_values)
    torch.testing.assert_close(found, transformers_models.build("dpt")(pixel_values).logits, atol=1e-5, rtol=0)


def test_features_of_a_model_of_one_size_are_shown_in_windows(tmp_path, capsys):
    checkpoint = transformers_models.save("dpt", tmp_path / "dpt")
    transformers_models.build("dpt", 11).save_pretrained(checkpoint)
    words = ["features", str(checkpoint), "--dataset", "synthetic@64x96", "--max_eval_samples", "2", "--points", "20"]
    assert main([*words, "--output_dir", str(tmp_path / "f")]) == 2
    assert "does not take images of 64x96 pixels" in capsys.readouterr().err
    InferenceSettings(mode="slide", crop_size=(64, 64)).save(checkpoint)
    assert main([*words, "--output_dir", str(tmp_path / "f")]) == 0


# Parameters in M with 150 classes: SegFormer, Table 1; Swin, Table 3; ConvNeXt, Table 5 (auxiliary head included).
@pytest.mark.parametrize(
    ("name", "millions"),
    [("segformer-b0", 3.8), ("segformer-b1", 13.7), ("upernet-swin-tiny", 60), ("upernet-convnext-tiny", 60)],
)
def test_models_by_name_have_the_published_size(name, millions):
    with torch.device("meta"):
        model = create_peer(name, num_labels=150)
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.051 if millions < 60 else 0.5)


def test_a_model_by_name_trains_from_random_weights(tmp_path):
    small = json.dumps({"hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 16})
    words = ["train", "--model", "segformer-b0", "--config_overrides", small, *WORDS, "--output_dir", str(tmp_path)]
    assert main(words) == 0
    assert "segformer-b0 on " in (tmp_path / "model" / "README.md").read_text()
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "model")
    assert model.config.model_type == "segformer" and model.config.hidden_sizes == [8] * 4
    assert main([*words[:2], "segformer-b0", "--config_overrides", '{"width": 3}', *WORDS]) == 2
    assert main([*words[:2], "segformer-b0", "--encoder_weights", "no.pth", *WORDS]) == 2
    assert main([*words[:2], "segformer-b7", *WORDS]) == 2
    trained = str(tmp_path / "model")
    assert main([*words[:2], trained, "--encoder_weights", trained, *WORDS, "--output_dir", str(tmp_path / "b")]) == 2


def test_models_by_name_take_the_encoder_weights_of_a_classifier(tmp_path):
    """UperNet those of timm's classifier with its layers behind the last stage, SegFormer those of its own encoder."""
    spec = ClassNames("c", ("a", "b", "c"))
    torch.manual_seed(1)
    lite0 = timm.create_model("tf_efficientnet_lite0")
    save_file(lite0.state_dict(), tmp_path / "lite0.safetensors")
    fields = {"model_type": "timm_backbone", "backbone": "tf_efficientnet_lite0", "out_indices": [1, 2, 3, 4]}
    overrides = {"backbone_config": fields, "hidden_size": 16, "auxiliary_in_channels": 112, "auxiliary_channels": 8}
    arguments = ModelArguments(
        model="upernet-convnext-tiny",
        config_overrides=overrides,
        encoder_weights=str(tmp_path / "lite0.safetensors"),
    )
    model = build_model(arguments, spec).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=[1, 2, 3, 4])
        maps.load_state_dict(lite0.state_dict(), strict=False)
        for ours, theirs in zip(model.backbone(image).feature_maps, maps.eval()(image), strict=True):
            torch.testing.assert_close(ours, theirs)
        assert model(image).logits.shape == (1, 3, 64, 96)

    small = {"hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4}
    encoder = SegformerModel(SegformerConfig(**small))
    encoder.save_pretrained(tmp_path / "encoder")
    arguments = ModelArguments(model="segformer-b0", config_overrides=small, encoder_weights=str(tmp_path / "encoder"))
    loaded = build_model(arguments, spec).segformer.state_dict()
    assert loaded.keys() == encoder.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in encoder.state_dict().items())
