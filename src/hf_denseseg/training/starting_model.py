"""The model that a recipe starts from."""

import logging
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from hf_denseseg.data.class_names import ClassNames
from hf_denseseg.data.class_order import class_order
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.errors import InputError, unknown_name
from hf_denseseg.models.auto.peers import PEERS, create_peer, encoder_prefix
from hf_denseseg.models.auto.pretrained import classes_of_checkpoint, has_one_logit, load_trained_model
from hf_denseseg.models.auto.registration import (
    create_config,
    create_model,
    list_models,
    load_official,
)
from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION, task_of_class
from hf_denseseg.models.backbone_weights import load_backbone
from hf_denseseg.models.channels import image_channels, with_image_channels
from hf_denseseg.models.configuration import CheckedFields
from hf_denseseg.training.arguments import ModelArguments

logger = logging.getLogger(__name__)


def build_model(arguments: ModelArguments, spec: LabelSpec | ClassNames, num_channels: int = 3) -> PreTrainedModel:
    """A published variant with random (or official encoder) weights, or a saved checkpoint.

    Weights of three channels are adapted to `num_channels`, see `with_image_channels`.

    Raises:
        InputError: neither a published name nor a loadable checkpoint (the nearest names are proposed), or a model
            for another task.
    """
    overrides = dict(arguments.config_overrides or {})
    one_logit = _has_one_logit(arguments, spec, overrides.get("num_labels"))
    names = {0: spec.classes[1]} if one_logit else spec.id2label
    overrides |= {"id2label": names, "label2id": {name: k for k, name in names.items()}}
    model = _load_or_create(arguments, spec, overrides, num_channels)
    if isinstance(model.config, CheckedFields) and model.config.one_logit:
        model.config.id2label, model.config.label2id = spec.id2label, spec.label2id
    return model


def _load_or_create(
    arguments: ModelArguments, spec: LabelSpec | ClassNames, fields: dict[str, Any], num_channels: int
) -> PreTrainedModel:
    if arguments.model in PEERS:
        _check_peer(arguments)
        if arguments.encoder_weights is None:
            return create_peer(arguments.model, num_channels=num_channels, **fields)
        model = create_peer(arguments.model, **fields)
        load_backbone(model, arguments.encoder_weights, encoder_prefix(model))
        return _adapted(model, num_channels)
    if arguments.model not in list_models():
        if not Path(arguments.model).exists() and arguments.model.count("/") != 1:
            raise InputError(
                unknown_name("model (neither a folder nor a hub id)", arguments.model, [*list_models(), *PEERS])
            )
        if arguments.encoder_weights is not None:
            raise InputError(
                f"{arguments.model} is a saved model with weights of its own, which encoder_weights would replace. "
                "Leave encoder_weights out, or start from a published name."
            )
        _check_class_names(arguments.model, spec)
        # A head for other classes starts from random weights; the rest is the checkpoint's.
        model = load_trained_model(arguments.model, arguments.task, ignore_mismatched_sizes=True, **fields)
        return _adapted(model, num_channels)
    _check_task(arguments)
    try:
        if arguments.encoder_weights is None:
            return create_model(arguments.model, num_channels=num_channels, **fields)
        family = create_config(arguments.model).model_type
        return _adapted(load_official(family, arguments.encoder_weights, arguments.model, **fields), num_channels)
    except (StrictDataclassError, TypeError) as error:
        raise InputError(f"config_overrides {arguments.config_overrides}: {error}") from error


def _adapted(model: PreTrainedModel, num_channels: int) -> PreTrainedModel:
    found = image_channels(model.config)
    if found != num_channels:
        logger.info("The first convolution is adapted from %d channels to %d.", found, num_channels)
    return with_image_channels(model, num_channels)


def _has_one_logit(arguments: ModelArguments, spec: LabelSpec | ClassNames, num_labels: int | None) -> bool:
    """Whether one logit shall tell the two classes of the data apart: on request, or as in the checkpoint.

    Raises:
        InputError: `num_labels` is another number than the data has classes.
    """
    segments_two = arguments.task == SEMANTIC_SEGMENTATION and spec.num_labels == 2
    if num_labels is None:
        by_name = arguments.model in list_models() or arguments.model in PEERS
        return segments_two and not by_name and has_one_logit(arguments.model)
    if num_labels == spec.num_labels:
        return False
    if num_labels != 1 or not segments_two:
        raise InputError(
            f"config_overrides: num_labels is {num_labels}, but {spec.name} has {spec.num_labels} classes. Leave it "
            "out; 1 is for the segmentation of two classes, background and foreground, by one logit."
        )
    return True


def _check_class_names(checkpoint: str, spec: LabelSpec | ClassNames) -> None:
    """Refuse to train a head whose classes are those of the data in another order; warn of other classes."""
    names = classes_of_checkpoint(checkpoint)
    if len(names) != spec.num_labels:
        return  # the head is a new one
    try:
        order = class_order(names, spec.classes, checkpoint, spec.name)
    except InputError:
        logger.warning("The head of %s starts from the weights of %d other classes.", checkpoint, len(names))
        return
    if order is not None:
        raise InputError(
            f"{checkpoint} has the classes of {spec.name} in another order, so its head would start from the weights "
            f"of other classes. Give `classes` of the label specification in its order: {', '.join(names)}."
        )


def _check_peer(arguments: ModelArguments) -> None:
    """Refuse what models of transformers by name do not have."""
    if arguments.task != SEMANTIC_SEGMENTATION:
        raise InputError(
            f"{arguments.model} is a model for {SEMANTIC_SEGMENTATION}, but the task is "
            f"{arguments.task}. Give a model "
            f"of `denseseg models`, or `task: {SEMANTIC_SEGMENTATION}`."
        )


def _check_task(arguments: ModelArguments) -> None:
    """Refuse a published variant whose head is for another task."""
    own = task_of_class((create_config(arguments.model).architectures or [""])[0])
    if own != arguments.task:
        raise InputError(
            f"{arguments.model} is a model for the task {own}, but the recipe's task is {arguments.task}. "
            f"Give `task: {own}`, or another model."
        )


__all__ = ["build_model"]
