"""The keys `num_channels`, `pixel_range`, `image_mean`, `image_std`: the same values for data, model and processor."""

from dataclasses import replace
from typing import Any

from transformers import AutoConfig

from hf_denseseg.data.reading.pixels import RGB_BYTES, PixelFormat
from hf_denseseg.errors import InputError
from hf_denseseg.models.auto.peers import PEERS
from hf_denseseg.models.auto.pretrained import MALFORMED, load_image_processor
from hf_denseseg.models.auto.registration import list_models
from hf_denseseg.models.channels import channel_statistics, image_channels
from hf_denseseg.training.arguments import ModelArguments
from hf_denseseg.training.data_arguments import DataArguments


def with_pixel_format(
    model: ModelArguments, data: DataArguments, training: bool
) -> tuple[ModelArguments, DataArguments]:
    """The same keys with `num_channels` and `pixel_range` set: as given, else the checkpoint's, else 8-bit RGB.

    Raises:
        InputError: values that are none, that contradict each other, or for an evaluation those of the checkpoint.
    """
    overrides = dict(model.config_overrides or {})
    given = overrides.pop("num_channels", None)
    if None not in (given, data.num_channels) and given != data.num_channels:
        raise InputError(
            f"num_channels is {data.num_channels}, but config_overrides says {given}. Leave it out of "
            "config_overrides."
        )
    channels = data.num_channels if given is None else given
    saved = checkpoint_format(model.model) or RGB_BYTES
    wanted = PixelFormat(
        saved.num_channels if channels is None else channels,
        data.pixel_range or saved.pixel_range,  # type: ignore[arg-type]
    )
    for name in ("image_mean", "image_std"):
        values = getattr(data, name)
        if values is not None and len(values) != wanted.num_channels:
            raise InputError(
                f"{name} has {len(values)} numbers, but num_channels is {wanted.num_channels}. Give one per channel."
            )
    if not training and wanted != saved:
        raise InputError(
            f"{model.model} was trained with num_channels {saved.num_channels} and pixel_range "
            f"{saved.shown_range}, but num_channels {wanted.num_channels} and pixel_range {wanted.shown_range} are "
            "given. Leave them out."
        )
    model = replace(model, config_overrides=overrides or None)
    return model, replace(data, num_channels=wanted.num_channels, pixel_range=wanted.pixel_range)  # type: ignore[arg-type]


def checkpoint_format(checkpoint: str) -> PixelFormat | None:
    """What a checkpoint's images are; None for a published name, and if it cannot be read (loading it says why)."""
    if checkpoint in PEERS or checkpoint in list_models():
        return None
    try:
        channels = image_channels(AutoConfig.from_pretrained(checkpoint, trust_remote_code=False))
    except MALFORMED:
        return None
    try:
        processor = load_image_processor(checkpoint)
    except InputError:
        return PixelFormat(channels)
    return PixelFormat(channels, PixelFormat.of_processor(processor).pixel_range)


def processor_values(model: ModelArguments, data: DataArguments) -> dict[str, Any]:
    """Fields of the image processor that the keys set; empty where the checkpoint's hold."""
    pixel_format, saved = data.pixel_format, checkpoint_format(model.model)
    values: dict[str, Any] = {}
    if (saved or RGB_BYTES).num_channels != pixel_format.num_channels:
        values = channel_statistics(pixel_format.num_channels)
    if pixel_format.pixel_range != (saved or RGB_BYTES).pixel_range:
        chosen = pixel_format.pixel_range
        values["pixel_range"] = chosen if isinstance(chosen, str) else list(chosen)
    return values | {name: given for name in ("image_mean", "image_std") if (given := getattr(data, name)) is not None}
