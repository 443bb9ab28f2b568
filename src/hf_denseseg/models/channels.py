"""Models for images of any number of channels, and first convolutions adapted from three."""

import copy
from typing import Any

from timm.models import adapt_input_conv
from transformers import PreTrainedConfig, PreTrainedModel

from hf_denseseg.errors import InputError

INNER = ("backbone_config", "wrapped_config")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GRAY_MEAN, GRAY_STD = 0.449, 0.226  # their means


def image_channels(config: PreTrainedConfig) -> int:
    """Number of channels of the images that a model takes; that of its backbone where it says nothing itself."""
    if (own := getattr(config, "num_channels", None)) is not None:
        return int(own)
    inner = (getattr(config, name, None) for name in INNER)
    return next((image_channels(each) for each in inner if each is not None), 3)


def set_image_channels(config: PreTrainedConfig, num_channels: int) -> None:
    """Set the number of channels in a configuration and in those inside it."""
    if hasattr(config, "num_channels"):
        config.num_channels = num_channels
    for name in INNER:
        if (inner := getattr(config, name, None)) is not None:
            set_image_channels(inner, num_channels)


def with_image_channels(model: PreTrainedModel, num_channels: int) -> PreTrainedModel:
    """A model for images of another number of channels, with the weights of `model`.

    The convolutions that read the image are adapted by timm's rule (`adapt_input_conv`): for one channel the kernels
    of red, green and blue are added up, so that a gray image gives what it gave as RGB; for more, they are repeated in
    turn and scaled by 3 / `num_channels`, which keeps the size of the sums.

    Args:
        model: takes three channels.
        num_channels: of the new model.

    Raises:
        InputError: the model takes neither three channels nor `num_channels`.
    """
    found = image_channels(model.config)
    if found == num_channels:
        return model
    config = copy.deepcopy(model.config)
    set_image_channels(config, num_channels)
    adapted = type(model)(config)
    state = model.state_dict()
    for name, needed in adapted.state_dict().items():
        if state[name].shape == needed.shape:
            continue
        if found != 3 or state[name].ndim != 4:
            raise InputError(
                f"{type(model).__name__} takes {found} channels, but num_channels is {num_channels}: only the weights "
                f"of three channels can be adapted. Give num_channels: {found}."
            )
        state[name] = adapt_input_conv(num_channels, state[name])
    adapted.load_state_dict(state)
    return adapted.train(model.training)


def channel_statistics(num_channels: int) -> dict[str, list[float]]:
    """`image_mean` and `image_std` of ImageNet, with the mean of its channels for gray and for further channels."""
    colors = 3 if num_channels >= 3 else 0
    return {
        "image_mean": [*IMAGENET_MEAN[:colors], *[GRAY_MEAN] * (num_channels - colors)],
        "image_std": [*IMAGENET_STD[:colors], *[GRAY_STD] * (num_channels - colors)],
    }


def check_statistics(image_processor: Any, config: PreTrainedConfig, name: str) -> None:
    """Refuse an image processor and a model for images of different numbers of channels.

    Raises:
        InputError: `image_mean` has another length than the model has channels.
    """
    mean, needed = getattr(image_processor, "image_mean", None), image_channels(config)
    if isinstance(mean, list | tuple) and len(mean) != needed:
        raise InputError(
            f"The image processor of {name} has {len(mean)} numbers in image_mean, but the model takes {needed} "
            "channels. Save a processor with one number per channel."
        )


__all__ = ["channel_statistics", "check_statistics", "image_channels", "set_image_channels", "with_image_channels"]
