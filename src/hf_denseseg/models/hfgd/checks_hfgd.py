"""Checks of an HFGD configuration against the configuration of the model that it wraps."""

from typing import Any


def check_wrapped(config: Any) -> None:
    """Refuse fields that a wrapped model decides itself.

    Args:
        config: an `HfgdConfig`, with or without `wrapped_config`.

    Raises:
        ValueError: such a field is set, or the numbers of classes differ; the message names the field to change.
    """
    wrapped = config.wrapped_config
    if wrapped is None:
        return
    if config.backbone_config is not None:
        raise ValueError("Give `backbone_config` or `wrapped_config`: a wrapped model brings its own backbone.")
    for name in ("extra_encoding", "upsampler", "output_stride"):
        if getattr(config, name) != getattr(type(config), name):
            raise ValueError(f"A wrapped model brings its own encoding and head: leave out `{name}`.")
    if wrapped.num_labels != config.num_labels:
        raise ValueError(
            f"The wrapped model has {wrapped.num_labels} classes and HFGD {config.num_labels}, but they share their "
            f"class tokens. Give both the same labels, for example `num_labels={wrapped.num_labels}`."
        )


__all__ = ["check_wrapped"]
