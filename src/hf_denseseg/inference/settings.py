"""The protocol by which an image is segmented; saved beside a checkpoint as `inference_settings.json`."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from hf_denseseg.errors import InputError, unknown_name
from hf_denseseg.files import write_atomic

SETTINGS_FILE = "inference_settings.json"
DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True)
class InferenceSettings:
    """Test protocol; all sizes are `(height, width)` in pixels.

    Args:
        mode: `"whole"` image or `"slide"` (overlapping windows).
        crop_size: window, needed for `"slide"`.
        stride: step of the window; default two thirds of it (512 -> 341, 769 -> 513).
        scales: ratios of the multi-scale test.
        flip: also run the model on the image flipped horizontally.
        base_size: the image is resized into this size times the scale, ratio kept; None is its own size.
        raise_short_side: the short side never gets smaller than the window's; with several scales the short side
            alone is fitted into `base_size`, and the long side follows (SETR's test protocol).
        keep_odd: each side n is scaled by itself, to `int(scale * (n - n % 2)) + n % 2`: 513 -> 257, 385, 641 (HFGD).
        pad_to_window: what is smaller than the window is padded to it at the right and bottom, with the mean color.
            With `"slide"` that is each view (mmsegmentation and UN-EPT; else the window shrinks to the view), with
            `"whole"` the image itself, before it is resized (HFGD).
        average: what is averaged over scales and flips, `"probabilities"` or `"logits"`.
        window_batch_size: windows per model call.
        accumulation_device: where full-size scores are summed, e.g. `"cpu"`; None is the model's device.
        chunk_classes: classes held at full resolution at once when the argmax is taken.
        threshold: a pixel is foreground if its probability is above it, in a model with one logit; others take the
            class of the highest probability.
        temperature: the logits are divided by it (Guo et al. 2017), after views were averaged their log-probabilities:
            the probabilities change, the predicted classes do not.

    Raises:
        InputError: a value is out of range, or values do not fit each other.
    """

    mode: str = "whole"
    crop_size: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    base_size: tuple[int, int] | None = None
    raise_short_side: bool = False
    keep_odd: bool = False
    pad_to_window: bool = False
    average: str = "probabilities"
    window_batch_size: int = 4
    accumulation_device: str | None = None
    chunk_classes: int = 8
    threshold: float = DEFAULT_THRESHOLD
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _choice("mode", self.mode, ("whole", "slide"))
        _choice("average", self.average, ("probabilities", "logits"))
        for name in ("crop_size", "stride", "base_size"):
            # Frozen: checked values are set past the dataclass.
            object.__setattr__(self, name, _size_pair(name, getattr(self, name)))
        for name in ("window_batch_size", "chunk_classes"):
            if not _is_positive_int(getattr(self, name)):
                raise InputError(f"Inference setting {name} is {getattr(self, name)!r}. Give a whole number above 0.")
        for name in ("flip", "raise_short_side", "keep_odd", "pad_to_window"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"Inference setting {name} is {getattr(self, name)!r}. Give true or false.")
        object.__setattr__(self, "scales", _scales(self.scales))
        object.__setattr__(self, "threshold", check_threshold(self.threshold))
        if not _is_temperature(self.temperature):
            raise InputError(
                f"Inference setting temperature is {self.temperature!r}. Give a number above 0 and below 1000; "
                "1 changes nothing."
            )
        self._check_window()
        if self.accumulation_device is not None:
            try:
                torch.device(self.accumulation_device)
            except (RuntimeError, TypeError) as error:
                raise InputError(
                    f"accumulation_device {self.accumulation_device!r} is no device. Use 'cpu' or 'cuda'."
                ) from error

    def _check_window(self) -> None:
        if self.crop_size is None:
            if self.mode == "slide" or self.stride or self.raise_short_side or self.pad_to_window:
                raise InputError(
                    "Sliding windows, `stride`, `raise_short_side` and `pad_to_window` need `crop_size`. "
                    "Give it as (height, width)."
                )
        elif self.stride and (self.stride[0] > self.crop_size[0] or self.stride[1] > self.crop_size[1]):
            raise InputError(
                f"stride {self.stride} is larger than crop_size {self.crop_size} and leaves pixels between windows. "
                "Make it at most the crop size."
            )
        if self.keep_odd and self.raise_short_side:
            raise InputError(
                "`keep_odd` (each side by itself) and `raise_short_side` (the ratio kept) contradict each other. "
                "Set one of them."
            )

    @property
    def views(self) -> int:
        """Number of views of an image: its scales, twice as many with `flip`."""
        return len(self.scales) * (2 if self.flip else 1)

    def window(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Window and its stride, the default stride filled in.

        Raises:
            InputError: there is no `crop_size`.
        """
        if self.crop_size is None:
            raise InputError("These inference settings have no window. Give `crop_size` as (height, width).")
        default = (max(round(self.crop_size[0] * 2 / 3), 1), max(round(self.crop_size[1] * 2 / 3), 1))
        return self.crop_size, self.stride or default

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML and JSON; `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "InferenceSettings":
        """Settings from a recipe section.

        Raises:
            InputError: a key is unknown (the nearest are proposed) or a value is wrong.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise InputError(unknown_name("inference setting", str(key), names))
        return cls(**values)

    def save(self, folder: str | Path) -> None:
        """Write `inference_settings.json` into a checkpoint folder."""
        write_atomic(Path(folder) / SETTINGS_FILE, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, checkpoint: str | Path) -> "InferenceSettings":
        """Settings saved with a checkpoint folder or hub id; the defaults if it has none."""
        path = saved_file(checkpoint, SETTINGS_FILE)
        if path is None:
            return cls()
        try:
            values = json.loads(Path(path).read_text())
        except ValueError as error:
            raise InputError(
                f"{path} is not valid JSON ({error}). Fix it, or delete it to use the defaults."
            ) from error
        if not isinstance(values, dict):
            raise InputError(f'{path} holds no settings. It must be one JSON object, e.g. {{"mode": "whole"}}.')
        return cls.from_dict(values)


def saved_file(checkpoint: str | Path, name: str) -> str | None:
    """Path of a file of a checkpoint, a folder or hub id; None if it has none of this name."""
    return cached_file(
        str(checkpoint),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )


def check_threshold(threshold: Any, num_labels: int = 1) -> float:
    """The threshold of a model with `num_labels` logits.

    Raises:
        InputError: it does not lie between 0 and 1, or has no effect since there are several logits.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold < 1:
        raise InputError(f"Inference setting threshold is {threshold!r}. Give a probability between 0 and 1.")
    if threshold != DEFAULT_THRESHOLD and num_labels != 1:
        raise InputError(
            f"threshold {threshold} is for models with one logit (num_labels 1); this one has {num_labels}, of which "
            "the highest wins. Leave it out."
        )
    return float(threshold)


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"Inference setting {name} is {value!r}. Use {' or '.join(map(repr, choices))}.")


def _is_temperature(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1000


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _size_pair(name: str, value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    # YAML and JSON give lists; one number is a square.
    pair = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2 or not all(map(_is_positive_int, pair)):
        raise InputError(f"Inference setting {name} is {value!r}. Give (height, width) in pixels, e.g. [512, 512].")
    return pair[0], pair[1]


def _scales(value: object) -> tuple[float, ...]:
    scales = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not scales or not all(isinstance(s, int | float) and not isinstance(s, bool) and 0 < s < 100 for s in scales):
        raise InputError(f"Inference setting scales is {value!r}. Give ratios above 0, e.g. [0.75, 1.0, 1.25].")
    return tuple(float(scale) for scale in scales)
