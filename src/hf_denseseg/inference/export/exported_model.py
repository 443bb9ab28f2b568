"""An exported model in the place of the model that it was made from, for evaluation and prediction."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_denseseg.errors import InputError
from hf_denseseg.inference.export.engines import ENGINES, Engine
from hf_denseseg.inference.export.record import is_export, read_record
from hf_denseseg.inference.preprocessing import Preprocessing
from hf_denseseg.inference.settings import InferenceSettings
from hf_denseseg.models.auto.pretrained import (
    load_image_processor,
    load_trained_model,
    read_config,
    task_of_checkpoint,
)
from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION
from hf_denseseg.models.one_logit import class_names

CODE_FORMATS = ("aoti",)  # machine code, which opening runs


class ExportedModel(PreTrainedModel):
    """Called as the model that was exported: `pixel_values` in, outputs with `logits` out.

    A class map becomes logits that are 1 for the class and 0 for the others.

    Args:
        config: of the checkpoint.
        engine: runs the exported model.
        record: content of `export.json`.
        preprocessing: of the checkpoint; class maps are made of bytes, for which the normalization is undone.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        engine: Engine,
        record: dict[str, Any],
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__(config)
        self.engine, self.record, self.preprocessing = engine, record, preprocessing
        # The only state: records of an evaluation are kept by the hash of the model's weights and buffers.
        checksum = bytes.fromhex(record["files"][record["file"]]["sha256"])
        self.register_buffer("checksum", torch.tensor(list(checksum), dtype=torch.uint8))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of inputs and outputs."""
        return torch.float32

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None) -> ModelOutput:
        """Run the exported model on a normalized batch `(B, C, H, W)`.

        Raises:
            InputError: images of different sizes, padded to one, or of another size than the export's one.
        """
        if (size := self.record["size"]) and size != list(pixel_values.shape[-2:]):
            raise InputError(
                f"This export takes images of {size[0]}x{size[1]} pixels; after preprocessing they have "
                f"{pixel_values.shape[-2]}x{pixel_values.shape[-1]}. Export with this --size, or in a format for all."
            )
        if pixel_mask is not None and not pixel_mask.all():
            raise InputError("An exported detector takes images of one size, without padding. Run them one by one.")
        if self.preprocessing is None:
            outputs = (each.to(pixel_values.device) for each in self.engine(pixel_values.float()))
            return ModelOutput(zip(self.record["outputs"], outputs, strict=True))
        (class_map,) = self.engine(self.preprocessing.bytes_of(pixel_values))
        classes = torch.arange(len(class_names(self.config)))[:, None, None]
        logits = (class_map.long()[:, None] == classes).float()  # (B, num_labels, H, W)
        return ModelOutput(logits=logits.to(pixel_values.device))

    def check_protocol(self, settings: InferenceSettings, needs_probabilities: bool) -> None:
        """Refuse a protocol that averages what class maps do not hold.

        Raises:
            InputError: the export holds class maps, and the protocol needs logits.
        """
        if self.preprocessing is not None and (needs_probabilities or settings.views > 1 or settings.mode != "whole"):
            raise InputError(
                "This export returns class maps: windows, several scales, flips and probabilities need the logits. "
                "Give --test_mode whole, or export without --with_argmax."
            )


def load_model(checkpoint: str, task: str = SEMANTIC_SEGMENTATION) -> PreTrainedModel:
    """A checkpoint as `load_trained_model` loads it, or the exported model that the folder holds.

    Raises:
        InputError: the folder cannot be used, its files are damaged, or what runs it is not installed.
        RunError: a hub id that cannot be downloaded.
    """
    return open_export(checkpoint, task) if is_export(checkpoint) else load_trained_model(checkpoint, task)


def open_export(folder: str | Path, task: str, trusted: bool = False) -> ExportedModel:
    """Open an exported model.

    Args:
        folder: that `denseseg export` wrote.
        task: of the checkpoint.
        trusted: also open formats that hold machine code.

    Raises:
        InputError: see `load_model`.
    """
    from hf_denseseg.inference.export.formats import FORMATS

    record = read_record(folder)
    chosen = FORMATS.get(record["format"])
    if chosen is None or chosen.file != record.get("file") or record["file"] not in record["files"]:
        raise InputError(f"{folder} names a format or file that this version does not know. Export it again.")
    if (own := task_of_checkpoint(str(folder)) or task) != task:
        raise InputError(
            f"{folder} is an export for {own}, not for {task}. Give an export or a checkpoint for {task}."
        )
    if chosen.name in CODE_FORMATS and not trusted:
        raise InputError(
            f"{folder} holds machine code, which opening it would run, so no command opens it. Evaluate another "
            "format; its scores stand in export.json."
        )
    chosen.check_installed()
    preprocessing = None
    if record.get("with_argmax"):
        preprocessing = Preprocessing.from_image_processor(load_image_processor(str(folder)))
    try:
        engine = ENGINES[chosen.name](Path(folder) / chosen.file)
    except Exception as error:  # the kinds are open-ended: each runtime has its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder} cannot be opened by {chosen.name} here ({reason}). Export it again.") from error
    return ExportedModel(read_config(str(folder)), engine, record, preprocessing).eval()
