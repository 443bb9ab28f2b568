"""A run from recipe to report: load data and model, train or evaluate, and write the results."""

import functools
import json
import logging
import resource
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, PreTrainedModel, set_seed

from hf_denseseg.data.class_names import ClassNames
from hf_denseseg.data.class_order import class_order
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.reading.pixels import RGB_BYTES
from hf_denseseg.errors import InputError
from hf_denseseg.evaluation.score_names import SCORE_NAMES
from hf_denseseg.files import atomic_path, check_output_folder, write_atomic
from hf_denseseg.inference.export.exported_model import ExportedModel, load_model
from hf_denseseg.inference.export.record import is_export
from hf_denseseg.models.auto.peers import PEERS, create_peer_image_processor
from hf_denseseg.models.auto.pretrained import load_image_processor
from hf_denseseg.models.auto.registration import create_image_processor, is_own
from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION
from hf_denseseg.models.channels import check_statistics
from hf_denseseg.models.one_logit import class_names
from hf_denseseg.models.setr.image_processing_setr import SetrImageProcessor as AnyImageProcessor
from hf_denseseg.reports.model_card import write_card
from hf_denseseg.reports.run_page import format_scores, write_report
from hf_denseseg.training.adaptation import check_adaptation
from hf_denseseg.training.checkpoints import explain_failed_save, step_of
from hf_denseseg.training.environment import machine, versions
from hf_denseseg.training.held_back import part_of
from hf_denseseg.training.pixel_keys import processor_values, with_pixel_format
from hf_denseseg.training.recipe import Recipe
from hf_denseseg.training.run_folder import check_folder, checkpoint_for_all, note_run, sole_run
from hf_denseseg.training.starting_model import build_model
from hf_denseseg.training.tasks.task import Task, spread
from hf_denseseg.training.tracking import SampleImages
from hf_denseseg.training.trainer import TaskTrainer
from hf_denseseg.visualization.learning_curve import save_learning_curve

logger = logging.getLogger(__name__)

CHECKED_SAMPLES = 64
LOCAL_FILES = ("data_root", "encoder_weights", "label_spec")  # keys whose paths are no one else's business


def train(recipe: Recipe) -> dict[str, Any]:
    """Train a recipe, or continue its run, and write the run folder.

    Args:
        recipe: what `load_recipe` reads from a file, or `make_recipe` makes of keys.

    Returns:
        The content of `results.json`.

    Raises:
        InputError: recipe, data or folder cannot be used, or another process trains there; nothing was trained.
    """
    check_adaptation(recipe.model, recipe.training)
    output = check_output_folder(recipe.training.output_dir or ".")
    with sole_run(output, recipe.training.process_index):
        return _train(recipe, output)


def _train(recipe: Recipe, output: Path) -> dict[str, Any]:
    origin = versions()  # of the code that runs; the checkout may be another one at the end
    finished = check_folder(recipe.given, recipe.training, output)
    if finished is not None:
        logger.info("%s already holds this run, finished. Give another --output_dir to train again.", output)
        return finished
    recipe = _with_pixel_format(recipe, training=True)
    set_seed(recipe.training.seed)  # of the initial weights; resuming restores the random states of the checkpoint
    train_data, eval_data = load_data(recipe, "train"), load_data(recipe, "eval")
    model = build_model(recipe.model, eval_data.spec, recipe.data.pixel_format.num_channels)
    trainer = build_trainer(recipe, model, eval_data, train_data)
    note_run(
        recipe.given, recipe.to_yaml(), recipe.training, output
    )  # not before: a recipe that is refused must not occupy the folder
    trainer.add_callback(SampleImages(trainer, functools.partial(recipe.task.draw_results, trainer)))
    checkpoint = checkpoint_for_all(output, recipe.training)
    started = time.perf_counter(), _cpu_seconds()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    cost = {
        "wall_seconds": time.perf_counter() - started[0],
        "cpu_seconds": _cpu_seconds() - started[1] - trainer.evaluation_cpu_seconds,
        "evaluation_cpu_seconds": trainer.evaluation_cpu_seconds,
        "resumed_from_step": 0 if checkpoint is None else step_of(checkpoint),
        "peak_memory_bytes": _peak_memory(recipe.training.device),
        "data_wait_fraction": trainer.data_time.fraction,
    }
    # The reported scores must be those of the weights that are saved.
    if recipe.training.load_best_model_at_end or trainer.scores.get("step") != trainer.state.global_step:
        trainer.evaluate()
    results = _results(recipe, trainer, eval_data, origin) | {"training": cost, "history": trainer.state.log_history}
    with explain_failed_save(output / "model"), trainer.unsharded_model(), trainer.weights_to_keep():
        trainer.save_model(str(output / "model"))
        if trainer.is_world_process_zero():
            # A pickle with paths of this machine, which is needed to resume a run, but not to use the model.
            (output / "model" / "training_args.bin").unlink(missing_ok=True)
            _write_outputs(recipe.task, output, results, trainer)
    trainer.accelerator.wait_for_everyone()
    return results


def evaluate(recipe: Recipe, fit_temperature: bool = False) -> dict[str, Any]:
    """Score a checkpoint, print the per-class table, and write `results.json` and the tables and pages of the task.

    Without a `test_` key in the recipe, the protocol saved with the checkpoint is used.

    Args:
        recipe: checkpoint, data and protocol.
        fit_temperature: fit the temperature of the checkpoint to this data, and save it with its protocol.

    Returns:
        The content of `results.json`.

    Raises:
        InputError: recipe, data, checkpoint or folder cannot be used.
    """
    if fit_temperature:
        _check_fit(recipe)
    origin = versions()
    output = check_output_folder(recipe.training.output_dir or ".")
    recipe = _with_pixel_format(recipe, training=False)
    eval_data = load_data(recipe, "eval")
    trainer = build_evaluator(recipe, eval_data)
    if fit_temperature:
        trainer.fit_temperature()
    with trainer.resumable_evaluation():
        results = _results(recipe, trainer, eval_data, origin) | {"command": _evaluation_command(recipe)}
        if trainer.is_world_process_zero():
            recipe.task.write_evaluation(trainer, results, output)
            write_atomic(output / "results.json", json.dumps(results, indent=1) + "\n")
            print(format_scores(results))
            logger.info("Written: %s", output / "results.json")
            if fit_temperature:
                settings = replace(trainer.settings, temperature=results["scores"]["fitted_temperature"])
                settings.save(recipe.model.model)
                logger.info("Temperature %.4g is saved with %s.", settings.temperature, recipe.model.model)
    return results


def export_scorer(recipe: Recipe, limit: int | None = None) -> Callable[[PreTrainedModel | None], dict[str, Any]]:
    """A function that scores a model in the place of a checkpoint, always on the same images with the same protocol.

    Args:
        recipe: checkpoint, data and protocol; its output folder is created, and stays empty.
        limit: largest number of images, spread evenly over the split.

    Returns:
        Takes an exported model, or None for the checkpoint; returns what `results.json` of an evaluation holds.
    """
    origin = versions()
    recipe = _with_pixel_format(recipe, training=False)
    data = load_data(recipe, "eval")
    if limit is not None:
        data = data._replace(dataset=data.dataset.select(spread(len(data.dataset), limit)))

    def score(model: PreTrainedModel | None) -> dict[str, Any]:
        trainer = build_evaluator(recipe, data, model)
        trainer.evaluate()
        return _results(recipe, trainer, data, origin)

    return score


def _check_fit(recipe: Recipe) -> None:
    """Refuse to fit a temperature that could not be saved, or would be saved with another protocol."""
    if recipe.task.name != SEMANTIC_SEGMENTATION:
        raise InputError(
            f"--fit_temperature is for {SEMANTIC_SEGMENTATION}; this checkpoint is for "
            f"{recipe.task.name}. Leave it out."
        )
    if given := [key for key in recipe.given if key.startswith("test_")]:
        raise InputError(
            f"--fit_temperature saves a temperature for the protocol of the checkpoint; leave --{given[0]} out."
        )
    if is_export(recipe.model.model):
        raise InputError("--fit_temperature needs the checkpoint: fit its temperature, then export it.")
    if not Path(recipe.model.model).is_dir():
        raise InputError(
            f"--fit_temperature saves the temperature in the checkpoint's folder, and {recipe.model.model} is none. "
            "Download the checkpoint, and give its folder."
        )


def submit(recipe: Recipe, path: Path) -> None:
    """Predict the evaluation split in the format of its server, see `submission`; labels are not needed.

    Raises:
        InputError: no server is known for the data, or the data, the checkpoint or `path` cannot be used.
        RunError: the server would refuse the predictions.
    """
    from hf_denseseg.evaluation.submission import check_target, server_for
    from hf_denseseg.training.tasks.submission import submit as predict_split

    if recipe.task.name != SEMANTIC_SEGMENTATION:
        raise InputError(
            f"--submission is for {SEMANTIC_SEGMENTATION}; this checkpoint is for {recipe.task.name}. Leave it out."
        )
    check_target(path)
    check_output_folder(recipe.training.output_dir or ".")
    check_output_folder(path.parent)
    recipe = _with_pixel_format(recipe, training=False)
    eval_data = recipe.task.load(recipe.data, "eval")  # without `check`: all pixels may be ignored
    server = server_for(eval_data.spec)
    predict_split(build_evaluator(recipe, eval_data), server, path)


def doubt(recipe: Recipe, min_pixels: int) -> None:
    """Rank the labels of the evaluation split that a checkpoint contradicts, see `training.tasks.doubt`.

    Raises:
        InputError: the task has no label maps, or the data, the checkpoint or the folder cannot be used.
    """
    check_output_folder(recipe.training.output_dir or ".")
    recipe = _with_pixel_format(recipe, training=False)
    recipe.task.rank_doubts(build_evaluator(recipe, load_data(recipe, "eval")), min_pixels)


def _with_pixel_format(recipe: Recipe, training: bool) -> Recipe:
    model, data = with_pixel_format(recipe.model, recipe.data, training)
    return replace(recipe, model=model, data=data)


def build_evaluator(recipe: Recipe, eval_data: Any, model: PreTrainedModel | None = None) -> Any:
    """Trainer with a checkpoint; the test protocol is the recipe's, or the checkpoint's if the recipe has none.

    Args:
        recipe: names the checkpoint.
        eval_data: see `load_data`.
        model: the checkpoint, if it is loaded already.
    """
    model = model or load_model(recipe.model.model, recipe.model.task)
    if len(classes := class_names(model.config)) != eval_data.spec.num_labels:
        raise InputError(
            f"{recipe.model.model} has {len(classes)} classes, {eval_data.spec.name} has "
            f"{eval_data.spec.num_labels}. Give a dataset with the classes that the checkpoint was trained on."
        )
    order = class_order_of(model, eval_data.spec, recipe.model.model)
    trainer: Any = build_trainer(recipe, model, eval_data)
    if order is not None:
        recipe.task.use_class_order(trainer, order)
    if not any(key.startswith("test_") for key in recipe.given):
        recipe.task.use_protocol_of(trainer, recipe.model.model)
    if isinstance(model, ExportedModel) and recipe.task.name == SEMANTIC_SEGMENTATION:
        model.check_protocol(trainer.settings, needs_probabilities=bool(trainer.measures))
    return trainer


def class_order_of(model: PreTrainedModel, spec: LabelSpec | ClassNames, checkpoint: str) -> list[int] | None:
    """Train id in the data of each class of a checkpoint, see `class_order`."""
    return class_order(class_names(model.config), spec.classes, checkpoint, spec.name)


def _evaluation_command(recipe: Recipe) -> str:
    """The command line that evaluates this recipe, without the paths of this machine."""
    words = ["denseseg", "evaluate", Path(recipe.model.model).name or "CHECKPOINT"]
    for key, value in recipe.given.items():
        if key not in ("model", "task", "output_dir"):
            values = value if isinstance(value, list) else [value]
            shown = [Path(each).name if key in ("dataset", "label_spec") else str(each) for each in values]
            words += [f"--{key}"] if value is True else [f"--{key}", *shown]
    return shlex.join(words)


def build_image_processor(recipe: Recipe, model: PreTrainedModel, training: bool = False) -> Any:
    """The checkpoint's image processor, or the family's, set to the recipe's test size and pixels."""
    processor = _image_processor(recipe, model, training, processor_values(recipe.model, recipe.data))
    check_statistics(processor, model.config, recipe.model.model)
    return processor


def _image_processor(recipe: Recipe, model: PreTrainedModel, training: bool, pixels: dict[str, Any]) -> Any:
    if not is_own(model.config):
        return _processor_of_transformers(recipe, training, pixels)
    if not (Path(recipe.model.model) / "preprocessor_config.json").exists():
        return create_image_processor(model.config, **recipe.task.processor_options(recipe.data), **pixels)
    saved = AutoImageProcessor.from_pretrained(recipe.model.model, **pixels)
    given = {key for key in recipe.given if key in ("crop_size", "crop_pct") or key.startswith("test_")}
    if recipe.task.name == SEMANTIC_SEGMENTATION or not given:
        return saved
    data, crop = recipe.data, getattr(saved, "crop_size", None)
    if crop and "crop_size" not in given:  # the checkpoint's crop, not the default of recipes
        data = replace(data, crop_size=[crop["height"], crop["width"]])
    return AutoImageProcessor.from_pretrained(recipe.model.model, **recipe.task.processor_options(data), **pixels)


def _processor_of_transformers(recipe: Recipe, training: bool, pixels: dict[str, Any]) -> Any:
    """The processor saved beside a model of transformers; after training it treats images as training did.

    Training shows crops of images at their own size, or of `test_base_size`, and labels that are train ids: the saved
    processor neither squeezes images into a square, nor crops or pads them, nor reduces labels again. Other images
    than 8-bit RGB need a processor of this package.
    """
    options = dict(pixels)
    if training:
        options |= recipe.task.processor_options(recipe.data) | {"do_reduce_labels": False}
        if recipe.data.pixel_format != RGB_BYTES:
            return AnyImageProcessor(**options)
    if recipe.model.model in PEERS:
        return create_peer_image_processor(**options)
    processor = load_image_processor(recipe.model.model, **options)
    for step in ("do_center_crop", "do_pad") if training else ():
        if getattr(processor, step, False):
            setattr(processor, step, False)
    return processor


def load_data(recipe: Recipe, part: str) -> Any:
    """Load the train or eval split and check some of its images.

    Raises:
        InputError: an image or label has a fault; each fault is listed with its file and a fix.
    """
    data = recipe.task.load(recipe.data, part)
    if recipe.data.eval_fraction is not None:
        data = part_of(data, recipe.data, part)
    faults = recipe.task.check(data, CHECKED_SAMPLES)
    if faults:
        shown = "\n  ".join(str(fault) for fault in faults[:5])
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise InputError(
            f"{recipe.data.dataset}: {len(faults)} faults (`denseseg data check` lists all):\n  {shown}{more}"
        )
    return data


def build_trainer(recipe: Recipe, model: PreTrainedModel, eval_data: Any, train_data: Any = None) -> TaskTrainer:
    """Build the trainer of the recipe's task."""
    processor = build_image_processor(recipe, model, training=train_data is not None)
    return recipe.task.build_trainer(recipe.data, recipe.training, model, processor, eval_data, train_data)


def _results(recipe: Recipe, trainer: TaskTrainer, eval_data: Any, origin: dict[str, str]) -> dict[str, Any]:
    return {
        "task": recipe.model.task,
        "model": recipe.model.model,
        "model_type": trainer.model.config.model_type,
        "parameters": parameter_count(trainer.model),
        "num_labels": trainer.model.config.num_labels,
        "dataset": recipe.data.dataset if recipe.data.dataset == "synthetic" else eval_data.spec.name,
        "split": recipe.data.eval_split if recipe.data.eval_fraction is None else f"part of {recipe.data.train_split}",
        "images": len(eval_data.dataset),
        "protocol": trainer.protocol,
        "scores": trainer.scores,
        "steps": trainer.state.global_step,
        "recipe": recipe_for_others(recipe),
        "versions": origin,
        "machine": machine(trainer.args),
    }


def recipe_for_others(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe without the folders of this machine; files are named without theirs."""
    return {
        key: Path(str(value)).name if key in LOCAL_FILES and Path(str(value)).exists() else value
        for key, value in recipe.given.items()
        if key not in ("output_dir", "dataset")
    }


def parameter_count(model: PreTrainedModel) -> int:
    """Parameters of a model without its adapters; of an exported one those of its checkpoint."""
    if isinstance(model, ExportedModel):
        return model.record["parameters"]
    return sum(each.numel() for name, each in model.named_parameters() if ".lora_" not in name)


def _write_outputs(task: Task, output: Path, results: dict[str, Any], trainer: TaskTrainer) -> None:
    """Write curve, images, card and page; `results.json` comes last, since it marks the run as finished."""
    key, label = SCORE_NAMES[task.name].main_metric
    save_learning_curve(results["history"], output / "learning_curve.png", f"eval_{key}", label)
    with atomic_path(output / "images.png") as aside:
        task.draw_results(trainer).save(aside)
    write_card(output / "model", results, trainer.spec)
    write_report(output, results, trainer.spec)
    write_atomic(output / "results.json", json.dumps(results, indent=1) + "\n")
    print(format_scores(results))
    logger.info("Written: %s (open index.html)", output)


def _cpu_seconds() -> float:
    """CPU time of this process and of its finished workers."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _peak_memory(device: torch.device) -> int:
    """Peak memory in bytes, of the GPU if the run was on one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
