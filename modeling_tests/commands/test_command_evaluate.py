"""Options of `denseseg evaluate`: a key without an effect there is refused, none is accepted and ignored."""

import pytest

from hf_denseseg.commands.evaluate import _check_keys
from hf_denseseg.errors import InputError
from hf_denseseg.models.auto.registration import create_image_processor, create_model
from hf_denseseg.training.recipe import load_recipe, recipe_fields
from hf_denseseg.training.run import build_image_processor
from test_published_hlg import REDUCED


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        (
            "semantic-segmentation",
            ["--crop_size", "64", "64"],
            "--crop_size changes nothing.* Did you mean --test_crop_",
        ),
        ("semantic-segmentation", ["--base_size", "64", "64"], "Did you mean --test_base_size"),
        ("semantic-segmentation", ["--learning_rate", "1.0"], "only training reads it. Leave it out"),
        ("object-detection", ["--longest_edge", "64"], "--longest_edge changes nothing"),
        ("image-classification", ["--scale", "0.1", "1.0"], "--scale changes nothing"),
    ],
)
def test_keys_of_training_are_refused(task, words, message):
    with pytest.raises(InputError, match=message):
        _check_keys(["--use_cpu", *words], task)


def test_keys_that_have_an_effect_are_taken():
    tests = [f"--{key}" for key in recipe_fields() if key.startswith("test_") and "flip" in key]
    _check_keys([*tests, "--max_eval_samples", "3", "--per_device_eval_batch_size", "2"], "semantic-segmentation")
    _check_keys(["--crop_size", "64", "64", "--crop_pct", "0.9"], "image-classification")


def test_a_classifier_is_tested_at_its_own_crop_unless_another_is_given(tmp_path):
    model = create_model("hlg-tiny", num_labels=3, **REDUCED)
    create_image_processor(model.config, size={"shortest_edge": 71}, crop_size=64).save_pretrained(tmp_path)
    sizes = []
    for words in ([], ["--crop_pct", "0.8"], ["--crop_pct", "0.8", "--crop_size", "32", "48"]):
        recipe = load_recipe(None, ["--task", "image-classification", "--model", str(tmp_path), *words])
        processor = build_image_processor(recipe, model)
        crop = processor.crop_size
        sizes.append((processor.size["shortest_edge"], (crop["height"], crop["width"])))
    assert sizes == [(71, (64, 64)), (80, (64, 64)), (40, (32, 48))]
