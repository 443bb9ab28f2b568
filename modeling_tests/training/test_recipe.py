"""Reading of recipes: every wrong key, type and value is one clear sentence."""

import pytest

from hf_denseseg.errors import InputError
from hf_denseseg.training import run as training_run
from hf_denseseg.training.recipe import load_recipe, parse_overrides


@pytest.fixture
def recipe_file(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_command_line_wins_over_the_file(recipe_file):
    recipe = load_recipe(recipe_file("max_steps: 5\nlearning_rate: 1.0e-3\n"), ["--max_steps", "7", "--flip", "false"])
    assert recipe.training.max_steps == 7
    assert recipe.training.learning_rate == 1e-3
    assert recipe.data.flip is False


def test_keys_about_the_recipe_s_model_do_not_reach_another_one(recipe_file):
    text = "model: dsct-tiny-sac\nconfig_overrides: {drop_path_rate: 0.2}\npublished: {mean_iou: 0.4}\nmax_steps: 5\n"
    other = load_recipe(recipe_file(text), ["--model", "segformer-b0"])
    assert other.model.config_overrides is None and other.model.published is None and other.training.max_steps == 5
    own = load_recipe(recipe_file(text), ["--model", "segformer-b0", "--config_overrides", "{depths: [1, 1, 1, 1]}"])
    assert own.model.config_overrides == {"depths": [1, 1, 1, 1]}
    for same in ("dsct-tiny-sac", "runs/x/model"):  # weights of the recipe's model keep them
        kept = load_recipe(recipe_file(text), ["--model", same]).model
        assert kept.config_overrides == {"drop_path_rate": 0.2} and kept.published == {"mean_iou": 0.4}


def test_output_folder_is_named_after_the_recipe(recipe_file):
    assert load_recipe(recipe_file("max_steps: 5\n")).training.output_dir == "runs/recipe"


def test_saved_recipe_reads_back_equal(recipe_file):
    first = load_recipe(
        recipe_file("max_steps: 5\ncrop_size: [64, 96]\n"), ["--config_overrides", "{hidden_size: 48}"]
    )
    again = load_recipe(recipe_file(first.to_yaml()))
    assert again.given == first.given
    assert (again.model, again.data) == (first.model, first.data)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--learning_rate", "1e-4"], {"learning_rate": 1e-4}),
        (["--crop_size", "64", "96"], {"crop_size": [64, 96]}),
        (["--test_scales", "0.5"], {"test_scales": [0.5]}),
        (["--bf16"], {"bf16": True}),
        (["--eval_strategy", "no"], {"eval_strategy": "no"}),
        (["--max-steps=3"], {"max_steps": 3}),
        (["--encoder_weights", "null"], {"encoder_weights": None}),
        (["--lr_scheduler_kwargs", "{power: 1.0}"], {"lr_scheduler_kwargs": {"power": 1.0}}),
        (["--class_weights", "stats.json:enet"], {"class_weights": "stats.json:enet"}),
        (["--class_weights", "1", "2.5"], {"class_weights": [1, 2.5]}),
    ],
)
def test_override_words_become_values(words, expected):
    assert parse_overrides(words) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnig_rate: 1.0e-4\n", "Unknown key 'learnig_rate'. Did you mean 'learning_rate'"),
        ("learning_rate: 1e-4\n", r"learning_rate must be float, but is '1e-4' \(str\). Write numbers with a dot"),
        ("max_steps: 1.5\n", "max_steps must be int"),
        ("max_steps: true\n", "max_steps must be int"),
        ("max_steps: 0\n", "max_steps is 0"),
        ("crop_size: 512\n", "crop_size must be list"),
        ("eval_strategy: no\n", "quote them"),
        ("loss_normalization: mean\n", "use 'valid' or 'all'"),
        ("lr_scheduler_type: poly\n", "poly"),
        ("test_mode: slide\n", "crop_size"),
        ("- a\n- b\n", "has no `key: value` lines"),
        ("a: [1\n", "not readable YAML"),
    ],
)
def test_wrong_recipe_is_refused_and_told_how_to_fix_it(recipe_file, text, message):
    with pytest.raises(InputError, match=message):
        load_recipe(recipe_file(text))


def test_missing_recipe_is_refused(tmp_path):
    with pytest.raises(InputError, match="No recipe at .*nowhere.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_value_without_key_is_refused():
    with pytest.raises(InputError, match="'100' has no key"):
        parse_overrides(["100"])


def test_warm_up_longer_than_the_run_is_shortened(recipe_file, caplog):
    assert load_recipe(recipe_file("max_steps: 2\nwarmup_steps: 1500\n")).training.warmup_steps == 1
    assert "warmup_steps is reduced" in caplog.text


def test_recipe_with_bf16_is_read_where_there_is_only_a_cpu(recipe_file):
    assert load_recipe(recipe_file("bf16: true\n")).training.bf16


def test_task_of_the_command_line_decides_which_keys_mean_something(recipe_file):
    path = recipe_file("task: image-classification\nmixup: 0.8\n")
    assert load_recipe(path).data.mixup == 0.8
    with pytest.raises(InputError, match="mixup .* belongs to image-classification"):
        load_recipe(path, ["--task", "object-detection"])


def test_polynomial_keeps_its_defaults_and_other_schedules_have_none(recipe_file):
    assert load_recipe(recipe_file("max_steps: 5\n")).training.lr_scheduler_kwargs == {"power": 0.9, "lr_end": 0.0}
    assert not load_recipe(recipe_file("lr_scheduler_type: cosine\n")).training.lr_scheduler_kwargs


def test_results_name_files_without_the_folders_of_this_machine(recipe_file, tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text("classes: [a, b]\n")
    recipe = load_recipe(recipe_file(f"label_spec: {spec}\nencoder_weights: timm:resnet50\n"))
    written = training_run.recipe_for_others(recipe)
    assert written == {"label_spec": "spec.yaml", "encoder_weights": "timm:resnet50"}
