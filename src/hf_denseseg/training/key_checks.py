"""Keys and values of TrainingArguments that cannot have their effect here: refused before anything is loaded."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.integrations import get_available_reporting_integrations

from hf_denseseg.errors import InputError, unknown_name
from hf_denseseg.evaluation.score_names import SCORE_NAMES
from hf_denseseg.models.auto.tasks import IMAGE_CLASSIFICATION
from hf_denseseg.ops.kernel_build import compiler
from hf_denseseg.training.arguments import TaskTrainingArguments

_TEXT = "it is for language models"
_RECORDS = "evaluation keeps one record per image and does not need it"
_PUSH = "push a finished run with `denseseg push RUN/model ORG/NAME`"
_COMMANDS = "the command says what is done: denseseg train, evaluate or predict"
# Key -> why it has no effect, and what to give instead.
UNUSED_KEYS: dict[str, str] = {
    "num_train_epochs": "runs are counted in optimizer steps: give --max_steps (epochs x images / total batch size)",
    "resume_from_checkpoint": "a run continues in its own folder: give the same command with its --output_dir; to "
    "start from trained weights, give --model RUN/model",
    "label_smoothing_factor": "transformers smooths class ids of images only: use label_smoothing",
    "auto_find_batch_size": "it would change the recipe's batch size: lower per_device_train_batch_size and raise "
    "gradient_accumulation_steps",
    "deepspeed": "give FSDP, see scripts/accelerate",
    "remove_unused_columns": "the datasets name the tensors",
    "label_names": "the datasets name the tensors",
    **dict.fromkeys(("average_tokens_across_devices", "use_liger_kernel", "liger_kernel_config", "use_cache"), _TEXT),
    **dict.fromkeys(("neftune_noise_alpha", "include_num_input_tokens_seen", "length_column_name"), _TEXT),
    **dict.fromkeys(("train_sampling_strategy", "group_by_length"), "the order is random, and the same when resumed"),
    **dict.fromkeys(("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object"), _RECORDS),
    **dict.fromkeys(("eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics"), _RECORDS),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), _PUSH),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _PUSH),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _COMMANDS),
}

# Keys that an evaluation reads besides `test_*`: those of the Trainer, and those of the data.
EVALUATION_ARGUMENTS = frozenset(
    (
        *("output_dir", "per_device_eval_batch_size", "channels_last", "bf16", "fp16", "bf16_full_eval"),
        *("fp16_full_eval", "tf32", "use_cpu", "disable_tqdm", "report_to", "run_name", "log_level", "ddp_backend"),
        *("ddp_timeout", "dataloader_num_workers", "dataloader_prefetch_factor"),
    )
)
EVALUATION_DATA = (
    *("dataset", "data_root", "label_spec", "dataset_columns", "dataset_revision", "eval_split"),
    *("overlap", "empty_images", "mask_suffix"),
    *("eval_fraction", "train_split", "max_eval_samples", "calibration"),
)


def refuse_unused_keys(given: Iterable[str]) -> None:
    """Raise an InputError for a key without effect; it says what to give instead."""
    for key in given:
        if key in UNUSED_KEYS:
            raise InputError(f"{key} has no effect here: {UNUSED_KEYS[key]}.")


def check_training_values(given: Mapping[str, Any], args: TaskTrainingArguments, task: str) -> None:
    """Refuse values that would fail in the middle of a run.

    Args:
        given: keys of the recipe and the command line.
        args: made of them.
        task: name of the recipe's task.

    Raises:
        InputError: such a value; the message says what to give instead.
    """
    if args.early_stopping_patience is not None:
        if args.early_stopping_patience < 1 or args.eval_strategy == "no":
            raise InputError(
                f"early_stopping_patience is {args.early_stopping_patience} and eval_strategy {args.eval_strategy!s}: "
                "a number of evaluations from 1 up is needed, and an eval_strategy other than no."
            )
        args.restore_callback_states_from_checkpoint = True  # a run that continues has waited as long before
    if args.early_stopping_patience is not None or args.metric_for_best_model is not None:
        if "metric_for_best_model" not in given:  # transformers takes the loss, which an evaluation does not compute
            args.metric_for_best_model, args.greater_is_better = SCORE_NAMES[task].main_metric[0], True
        _check_metric(str(args.metric_for_best_model), SCORE_NAMES[task].logged)
    _check_trackers(args.report_to or ())
    if args.torch_compile and args.device.type == "cpu" and compiler() is None:
        raise InputError("torch_compile needs a C++ compiler on a CPU, and there is none: `apt install g++`.")


def _check_metric(given: str, known: tuple[str, ...]) -> None:
    """Propose the score that is meant: mIoU and miou are mean_iou, box_AP is box_ap."""
    plain = given.removeprefix("eval_")
    if plain in known:
        return
    alike = {name.replace("mean_", "m").replace("_", ""): name for name in known}
    meant = alike.get(plain.lower().replace("mean", "m").replace("_", "").replace(" ", ""))
    proposal = f"Did you mean {meant!r}?" if meant else f"Use one of {', '.join(known)}."
    raise InputError(f"metric_for_best_model: {given!r} is not a score of this task. {proposal}")


def _check_trackers(names: Iterable[str] | str) -> None:
    installed = get_available_reporting_integrations()
    for name in [names] if isinstance(names, str) else names:
        if name in ("none", "all") or name in installed:
            continue
        known = ("tensorboard", "trackio", "wandb", "mlflow", "comet_ml", "clearml", "swanlab", "dvclive", "neptune")
        if name in known:
            raise InputError(f"report_to: {name} is not installed: `pip install {name}`, or leave it out.")
        raise InputError(unknown_name("tracker (report_to)", str(name), known))


def is_read_in_evaluation(key: str, task: str) -> bool:
    """Whether a key of a recipe has an effect on `denseseg evaluate`, and is accepted on its command line."""
    if key.startswith("test_") or key == "task" or key in EVALUATION_DATA or key in EVALUATION_ARGUMENTS:
        return True
    return task == IMAGE_CLASSIFICATION and key in ("crop_size", "crop_pct")


__all__ = ["UNUSED_KEYS", "check_training_values", "is_read_in_evaluation", "refuse_unused_keys"]
