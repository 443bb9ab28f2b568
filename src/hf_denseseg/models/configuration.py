"""What all configurations share: unknown fields are refused, maps have names, one logit stands for two classes."""

import difflib
from collections.abc import Collection
from contextvars import ContextVar
from typing import Any, Self

from transformers import PreTrainedConfig
from transformers.utils import logging

_reading: ContextVar[bool] = ContextVar("reading a configuration", default=False)
_KEPT_BY_TRANSFORMERS = frozenset(
    ("torch_dtype", "attn_implementation", "experts_implementation", "per_layer_config", "stage_names")
    + ("auto_map", "custom_pipelines", "quantization_config", "use_cache")
)


class CheckedFields:
    """First base class of every configuration.

    transformers stores unknown arguments as plain attributes, so `hiden_size=64` would pass silently. A checkpoint of
    a later version, or with a field of its user, still loads.

    Attributes:
        one_logit: a segmentation model with one logit (`num_labels` 1) has two classes, and `id2label` names both.
    """

    one_logit = False

    @property
    def num_labels(self) -> int | None:
        """Number of logits: that of the names in `id2label`, or 1 with `one_logit`."""
        names = self.id2label  # type: ignore[attr-defined]
        return 1 if names and self.one_logit and len(names) == 2 else names and len(names)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        if self.one_logit and count != 1:
            self.one_logit = False
        PreTrainedConfig.num_labels.fset(self, count)  # type: ignore[attr-defined]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """As transformers' method, which also reads files; unknown fields are kept, with a warning."""
        token = _reading.set(True)
        try:
            return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        finally:
            _reading.reset(token)

    def name_maps(self, names: list[str], kwargs: dict[str, Any], default: list[str] | None = None) -> None:
        """Name the maps that the backbone class can return, and choose those that it does.

        Args:
            names: of all maps, in the order in which they are computed.
            kwargs: of the constructor; `out_features` and `out_indices` are taken out.
            default: names of the maps that are returned if neither is given; None is the last one.
        """
        self.stage_names = names
        chosen = {name: kwargs.pop(name, None) for name in ("out_features", "out_indices")}
        if not any(each is not None for each in chosen.values()):
            chosen["out_features"] = default
        self.set_output_features_output_indices(**chosen)  # type: ignore[attr-defined]

    def check_fields(self, extra: Collection[str]) -> None:
        """Refuse keyword arguments that are no field of this configuration, or warn while a file is read.

        Raises:
            ValueError: with the name of the nearest field, if there is one.
        """
        kind = type(self)
        fields = [name for name in kind.__dataclass_fields__ if not name.startswith("_")]  # type: ignore[attr-defined]
        for name in extra:
            if name.startswith("_") or hasattr(kind, name) or name in _KEPT_BY_TRANSFORMERS:
                continue
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.6)
            proposal = f" Did you mean {near[0]!r}?" if near else ""
            message = f"{kind.__name__} has no field {name!r}.{proposal}"
            if not _reading.get():
                raise ValueError(message)
            logging.get_logger("transformers.hf_denseseg").warning(
                f"{message} It is kept and has no effect; the file may come from a later version of hf_denseseg."
            )


__all__ = ["CheckedFields"]
