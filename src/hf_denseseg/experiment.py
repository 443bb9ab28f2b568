"""One run from recipe to report: load data and model, train or evaluate, and write what a reader needs."""

import json
import logging
import platform
import resource
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoImageProcessor,
    PreTrainedModel,
    set_seed,
)

from hf_denseseg import __version__
from hf_denseseg.checkpoints import load_trained_model
from hf_denseseg.data.checks import check_dataset
from hf_denseseg.data.datasets import SegmentationData, load_segmentation
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.transforms import EvalDataset, StreamingTrainDataset, TrainAugmentation, TrainDataset
from hf_denseseg.errors import InputError
from hf_denseseg.files import atomic_path, check_output_folder, write_atomic
from hf_denseseg.inference import segment
from hf_denseseg.inference_settings import InferenceSettings
from hf_denseseg.model_card import write_card
from hf_denseseg.naming import unknown_name
from hf_denseseg.recipe import DataArguments, ModelArguments, Recipe
from hf_denseseg.registration import (
    create_config,
    create_image_processor,
    create_model,
    list_models,
    load_official,
)
from hf_denseseg.reports import format_scores, write_report
from hf_denseseg.training import SegmentationTrainer, last_complete_checkpoint
from hf_denseseg.visualization import picture_grid, save_learning_curve

logger = logging.getLogger(__name__)

CHECKED_PICTURES = 64
SHOWN_PICTURES = 6
# Keys that change where a run writes or how fast it goes, not what comes out.
FREE_KEYS = {"output_dir", "dataloader_num_workers", "disable_tqdm", "report_to", "logging_steps", "run_name"}


def train(recipe: Recipe) -> dict[str, Any]:
    """Train (or go on training) a recipe and write the run folder.

    Returns:
        What `results.json` holds.

    Raises:
        InputError: recipe, data or folder cannot be used; nothing was trained.
    """
    output = check_output_folder(recipe.training.output_dir or ".")
    finished = _settle_folder(recipe, output)
    if finished is not None:
        logger.info("%s holds this run, finished. Give another --output_dir to train again.", output)
        return finished
    set_seed(recipe.training.seed)
    train_data, eval_data = _load_data(recipe.data, "train"), _load_data(recipe.data, "eval")
    model = build_model(recipe.model, eval_data.spec)
    processor = build_image_processor(recipe, model)
    trainer = _build_trainer(recipe, model, processor, eval_data, train_data)
    with recipe.training.main_process_first(desc="looking for a checkpoint"):
        checkpoint = last_complete_checkpoint(output)
    if checkpoint is not None:
        logger.info("Going on from %s.", checkpoint)
    started = time.perf_counter(), _cpu_seconds()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    cost = {
        "wall_seconds": time.perf_counter() - started[0],
        "cpu_seconds": _cpu_seconds() - started[1] - trainer.evaluation_cpu_seconds,
        "evaluation_cpu_seconds": trainer.evaluation_cpu_seconds,
        "resumed_from_step": 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]),
        "peak_memory_bytes": _peak_memory(),
    }
    if recipe.training.load_best_model_at_end or trainer.scores.get("step") != trainer.state.global_step:
        trainer.evaluate()
    results = _results(recipe, trainer, eval_data) | {"training": cost, "history": trainer.state.log_history}
    with trainer.averaged_weights():
        trainer.save_model(str(output / "model"))
        if trainer.is_world_process_zero():
            # A pickle with this machine's paths: of use to a resumed run, not to who gets the model.
            (output / "model" / "training_args.bin").unlink(missing_ok=True)
            _write_outputs(output, results, trainer, eval_data)
    trainer.accelerator.wait_for_everyone()
    return results


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """Score a checkpoint, print the per-class table and write `results.json`.

    Without a `test_` key in the recipe, the protocol saved with the checkpoint is used.
    """
    output = check_output_folder(recipe.training.output_dir or ".")
    eval_data = _load_data(recipe.data, "eval")
    model = load_trained_model(recipe.model.model)
    if model.config.num_labels != eval_data.spec.num_labels:
        raise InputError(
            f"{recipe.model.model} knows {model.config.num_labels} classes, {eval_data.spec.name} has "
            f"{eval_data.spec.num_labels}. Give the data set the checkpoint was trained on."
        )
    processor = build_image_processor(recipe, model)
    trainer = _build_trainer(recipe, model, processor, eval_data)
    if not any(key.startswith("test_") for key in recipe.given):
        trainer.settings = InferenceSettings.load(recipe.model.model)
    trainer.evaluate()
    results = _results(recipe, trainer, eval_data)
    if trainer.is_world_process_zero():
        write_atomic(output / "results.json", json.dumps(results, indent=1) + "\n")
        print(format_scores(results["scores"]))
        logger.info("Written: %s", output / "results.json")
    return results


def build_model(arguments: ModelArguments, spec: LabelSpec) -> PreTrainedModel:
    """A published variant with random (or official encoder) weights, or a saved checkpoint.

    Raises:
        InputError: neither a published name nor a loadable checkpoint; the nearest names are proposed.
    """
    labels = {"id2label": spec.id2label, "label2id": spec.label2id}
    overrides = dict(arguments.config_overrides or {})
    if arguments.model not in list_models():
        if not Path(arguments.model).exists() and arguments.model.count("/") != 1:
            raise InputError(unknown_name("model (neither a folder nor a hub id)", arguments.model, list_models()))
        # A head for other classes is made anew; the rest is what the checkpoint learned.
        return load_trained_model(arguments.model, ignore_mismatched_sizes=True, **labels, **overrides)
    fields = labels | overrides
    try:
        if arguments.encoder_weights is None:
            return create_model(arguments.model, **fields)
        family = create_config(arguments.model).model_type
        return load_official(family, arguments.encoder_weights, arguments.model, **fields)
    except (StrictDataclassError, TypeError) as error:
        raise InputError(f"config_overrides {overrides}: {error}") from error


def build_image_processor(recipe: Recipe, model: PreTrainedModel) -> Any:
    """The checkpoint's image processor, or the family's, set to the size that the recipe tests at."""
    if (Path(recipe.model.model) / "preprocessor_config.json").exists():
        return AutoImageProcessor.from_pretrained(recipe.model.model)
    base = recipe.data.test_base_size
    resize: dict[str, Any] = {"do_resize": base is not None}
    if base is not None:
        resize["size"] = {"shortest_edge": min(base), "longest_edge": max(base)}
    return create_image_processor(model.config, **resize)


def _settle_folder(recipe: Recipe, output: Path) -> dict[str, Any] | None:
    """Refuse a folder of another run, give the results of a finished one, else note the recipe."""
    note = output / "recipe.yaml"
    if note.exists():
        import yaml

        there = yaml.safe_load(note.read_text()) or {}
        keys = [key for key in there.keys() | recipe.given.keys() if there.get(key) != recipe.given.get(key)]
        differing = sorted(set(keys) - FREE_KEYS)
        if differing:
            lines = ", ".join(f"{key} ({there.get(key)} there, {recipe.given.get(key)} now)" for key in differing[:3])
            raise InputError(f"{output} holds another run, different in {lines}. Give another --output_dir.")
        if (output / "results.json").exists():
            return json.loads((output / "results.json").read_text())
    else:
        write_atomic(note, recipe.to_yaml())
    return None


def _load_data(arguments: DataArguments, part: str) -> SegmentationData:
    """Load the train or eval split and look through its first pictures.

    Raises:
        InputError: a picture or label is faulty; each fault with its file and remedy.
    """
    training = part == "train"
    data = load_segmentation(
        arguments.dataset,
        arguments.train_split if training else arguments.eval_split,
        spec=arguments.label_spec,
        columns=arguments.dataset_columns,
        revision=arguments.dataset_revision,
        streaming=arguments.streaming and training,
        limit=arguments.max_train_samples if training else arguments.max_eval_samples,
    )
    faults = [] if arguments.streaming and training else check_dataset(data, limit=CHECKED_PICTURES)
    if faults:
        shown = "\n  ".join(str(fault) for fault in faults[:5])
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise InputError(
            f"{arguments.dataset}: {len(faults)} faults (`denseseg data check` lists all):\n  {shown}{more}"
        )
    return data


def _build_trainer(
    recipe: Recipe,
    model: PreTrainedModel,
    processor: Any,
    eval_data: SegmentationData,
    train_data: SegmentationData | None = None,
) -> SegmentationTrainer:
    data, seed = recipe.data, recipe.training.seed
    train_dataset = None
    if train_data is not None:
        augmentation = TrainAugmentation(
            tuple(data.crop_size),
            base_size=tuple(data.base_size) if data.base_size else None,
            scale_range=tuple(data.scale_range),
            max_class_ratio=data.max_class_ratio,
            flip=data.flip,
            photometric=data.photometric_distortion,
        )
        kind = StreamingTrainDataset if data.streaming else TrainDataset
        train_dataset = kind(train_data, augmentation, seed, targets=getattr(model, "training_targets", None))
    return SegmentationTrainer(
        model,
        recipe.training,
        image_processor=processor,
        spec=eval_data.spec,
        settings=data.inference_settings(),
        train_dataset=train_dataset,
        eval_dataset=EvalDataset(eval_data),
    )


def _results(recipe: Recipe, trainer: SegmentationTrainer, eval_data: SegmentationData) -> dict[str, Any]:
    return {
        "model": recipe.model.model,
        "model_type": trainer.model.config.model_type,
        "parameters": trainer.model.num_parameters(),
        "dataset": recipe.data.dataset if recipe.data.dataset == "synthetic" else eval_data.spec.name,
        "split": recipe.data.eval_split,
        "pictures": len(eval_data.dataset),
        "protocol": trainer.settings.to_dict(),
        "scores": trainer.scores,
        "steps": trainer.state.global_step,
        "recipe": {key: value for key, value in recipe.given.items() if key not in ("output_dir", "dataset")},
        "versions": {
            "hf_denseseg": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _write_outputs(
    output: Path, results: dict[str, Any], trainer: SegmentationTrainer, eval_data: SegmentationData
) -> None:
    """Curve, pictures, card and page; `results.json` last, since it marks the run as finished."""
    save_learning_curve(results["history"], output / "learning_curve.png")
    rows = []
    count = len(eval_data.dataset)
    shown = min(SHOWN_PICTURES, count)
    for index in (place * count // shown for place in range(shown)):  # neighbours are often frames of one video
        sample = trainer.eval_dataset[index]
        image = sample["image"].to(trainer.args.device)
        with torch.no_grad():
            prediction = segment(
                trainer.accelerator.unwrap_model(trainer.model), image, trainer.settings, trainer.mean, trainer.std
            )
        rows.append((sample["image"], sample["label"], prediction.cpu()))
    with atomic_path(output / "pictures.png") as aside:
        picture_grid(rows, eval_data.spec).save(aside)
    write_card(output / "model", results, eval_data.spec)
    write_report(output, results, eval_data.spec)
    write_atomic(output / "results.json", json.dumps(results, indent=1) + "\n")
    print(format_scores(results["scores"]))
    logger.info("Written: %s (open index.html)", output)


def _cpu_seconds() -> float:
    """CPU time of this process and of its workers that have ended."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _peak_memory() -> int:
    """Peak bytes on the accelerator, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
