"""No key of TrainingArguments is accepted and ignored; values that would fail later are refused first."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from test_training import WORDS
from transformers import TrainingArguments

import hf_denseseg
from hf_denseseg.cli import main
from hf_denseseg.errors import InputError
from hf_denseseg.evaluation.score_names import SCORE_NAMES
from hf_denseseg.training.key_checks import UNUSED_KEYS
from hf_denseseg.training.recipe import load_recipe, recipe_fields
from hf_denseseg.training.run import load_data

# Keys that transformers' own Trainer, accelerate or torch follow in our trainers too, by what they concern.
FOLLOWED = {
    "optimizer": "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay "
    "adam_beta1 adam_beta2 adam_epsilon optim_target_modules max_grad_norm warmup_ratio",
    "steps": "output_dir max_steps per_device_train_batch_size gradient_accumulation_steps seed data_seed "
    "full_determinism ignore_data_skip",
    "precision": "bf16 fp16 bf16_full_eval fp16_full_eval tf32 use_cpu bf16_full_eval jit_mode_eval",
    "memory": "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing "
    "gradient_checkpointing_kwargs torch_empty_cache_steps skip_memory_metrics debug",
    "compiling": "torch_compile torch_compile_backend torch_compile_mode",
    "logging": "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level "
    "log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id "
    "trackio_static_space_id",
    "evaluation": "eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size "
    "load_best_model_at_end metric_for_best_model greater_is_better",
    "checkpoints": "save_strategy save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint "
    "restore_callback_states_from_checkpoint",
    "loading": "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
    "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order",
    "processes": "accelerator_config parallelism_config ddp_find_unused_parameters ddp_bucket_cap_mb "
    "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config local_rank",
}


def test_every_key_of_transformers_is_followed_or_refused():
    followed = {key for keys in FOLLOWED.values() for key in keys.split()}
    assert not followed & UNUSED_KEYS.keys()
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert not known - followed - UNUSED_KEYS.keys(), "say in UNUSED_KEYS what to give instead, or in FOLLOWED"


@pytest.mark.parametrize("key", [key for key in UNUSED_KEYS if key in TrainingArguments.__dataclass_fields__])
def test_a_key_without_effect_is_refused_with_what_to_give_instead(key):
    kind = str(TrainingArguments.__dataclass_fields__[key].type)
    value = (
        "{a: 1}" if "dict" in kind else "[a]" if "list" in kind else "1" if "int" in kind or "float" in kind else "x"
    )
    words = [f"--{key}"] if "bool" in kind else [f"--{key}", value]
    with pytest.raises(InputError, match=f"{key} (has no effect here: |must be )"):
        load_recipe(None, words)


@pytest.mark.parametrize("given", ["mIoU", "miou", "MeanIoU", "eval_miou"])
def test_other_spellings_of_the_metric_are_proposed(given):
    with pytest.raises(InputError, match="Did you mean 'mean_iou'"):
        load_recipe(None, ["--metric_for_best_model", given])


def test_unknown_metrics_are_refused_and_those_that_are_logged_accepted():
    with pytest.raises(InputError, match="Use one of mean_iou, pixel_accuracy, mean_accuracy"):
        load_recipe(None, ["--metric_for_best_model", "f1"])
    for task, names in SCORE_NAMES.items():
        for name in names.logged:
            recipe = load_recipe(None, ["--task", task, "--metric_for_best_model", name])
            assert recipe.training.greater_is_better is True


def test_the_best_model_is_that_of_the_main_metric_by_default():
    training = load_recipe(None, ["--load_best_model_at_end", "--task", "object-detection"]).training
    assert (training.metric_for_best_model, training.greater_is_better) == ("box_ap", True)


def test_missing_and_misspelled_trackers_are_refused_before_training():
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(InputError, match="wandb is not installed: `pip install wandb`"):
            load_recipe(None, ["--report_to", "wandb"])
    with pytest.raises(InputError, match="Did you mean 'wandb'"):
        load_recipe(None, ["--report_to", "wanbd"])


def test_a_finished_run_can_be_made_longer(tmp_path, caplog):
    words = [*WORDS, "--output_dir", str(tmp_path), "--max_steps"]
    assert main(["train", *words, "4"]) == 0
    before = json.loads((tmp_path / "results.json").read_text())
    assert main(["train", *words, "3"]) == 2  # it cannot be made shorter
    with caplog.at_level("INFO"):
        assert main(["train", *words, "6"]) == 0
    assert "continues to step 6, and from here on the learning rate follows the schedule of 6 steps" in caplog.text
    after = json.loads((tmp_path / "results.json").read_text())
    assert (before["steps"], after["steps"], after["training"]["resumed_from_step"]) == (4, 6, 4)
    state = torch.load(tmp_path / "checkpoint-6" / "scheduler.pt", weights_only=True)
    assert state["last_epoch"] == 6


def test_a_refused_command_leaves_a_folder_that_the_right_one_can_use(tmp_path):
    words = [*WORDS, "--output_dir", str(tmp_path), "--max_steps", "2"]
    assert main(["train", *words, "--class_weights", "1.0", "2.0"]) == 2  # two weights for eleven classes
    assert not (tmp_path / "recipe.yaml").exists()
    assert main(["train", *words]) == 0


def test_training_stops_when_the_score_does_not_improve(tmp_path):
    words = [word for word in WORDS if word not in ("--eval_strategy", "no")]
    words += ["--output_dir", str(tmp_path), "--max_steps", "40", "--eval_steps", "1", "--learning_rate", "1.0e-9"]
    assert main(["train", *words, "--early_stopping_patience", "2"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    scores = [row["eval_mean_iou"] for row in results["history"] if "eval_mean_iou" in row]
    assert results["steps"] == len(scores) < 40
    worse = [score <= max(scores[:index], default=-1) for index, score in enumerate(scores)]
    assert worse[-2:] == [True, True] and not any(a and b for a, b in zip(worse[:-2], worse[1:-1], strict=True))


@pytest.mark.parametrize("words", [["0"], ["3", "--eval_strategy", "no"]])
def test_patience_that_cannot_be_followed_is_refused(words):
    with pytest.raises(InputError, match="a number of evaluations from 1 up is needed"):
        load_recipe(None, ["--early_stopping_patience", *words])


@pytest.mark.parametrize("task", ["semantic-segmentation", "image-classification", "object-detection"])
def test_a_part_of_the_training_split_can_be_held_back(task):
    words = ["--task", task, "--dataset", "synthetic:200", "--eval_fraction", "0.2"]
    ids = {}
    for part in ("train", "eval"):
        ids[part] = set(load_data(load_recipe(None, words), part).dataset.with_format(None)["id"])
    total = len(load_data(load_recipe(None, words[:4]), "train").dataset)
    assert not ids["train"] & ids["eval"]
    assert len(ids["train"] | ids["eval"]) >= total  # detection leaves empty images out of training only
    assert 0.1 < len(ids["eval"]) / total < 0.3
    limited = load_data(load_recipe(None, [*words, "--max_eval_samples", "5"]), "eval").dataset
    assert set(limited.with_format(None)["id"]) < ids["eval"] and len(limited) == 5
    with pytest.raises(InputError, match="between 0 and 1"):
        load_data(load_recipe(None, [*words[:-1], "1.5"]), "eval")


def test_every_key_of_ours_is_read_somewhere():
    """Keys of the test protocol are read together, see `inference_settings`."""
    root = Path(hf_denseseg.__file__).parent
    declared = ("arguments.py", "data_arguments.py")
    text = "\n".join(path.read_text() for path in root.rglob("*.py") if path.name not in declared)
    own = [name for name, (owner, _) in recipe_fields().items() if name in owner.__annotations__]
    unread = [name for name in own if not re.search(rf"\.{name}\b", text) and not name.startswith("test_")]
    assert len(own) > 60 and not set(unread) - set(TrainingArguments.__dataclass_fields__), unread
