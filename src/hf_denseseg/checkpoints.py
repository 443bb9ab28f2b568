"""Open a trained segmentation checkpoint for use, or say why it is none."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, PreTrainedModel

from hf_denseseg.errors import InputError, RunError


def load_trained_model(checkpoint: str, **overrides: Any) -> PreTrainedModel:
    """Load a semantic segmentation model with all its weights, in eval mode.

    Args:
        checkpoint: folder or hub id.
        overrides: configuration fields; `ignore_mismatched_sizes=True` makes a head for other classes anew.

    Raises:
        InputError: no folder of a saved model, a model of another kind, one that lacks weights, or overrides that
            change the shape of the encoder's.
        RunError: a hub id that cannot be fetched.
    """
    folder = Path(checkpoint)
    if folder.exists() and not (folder / "config.json").exists():
        raise InputError(
            f"{checkpoint} holds no config.json. Give the folder of a saved model (a run's `model` folder)."
        )
    try:
        model, loaded = AutoModelForSemanticSegmentation.from_pretrained(
            checkpoint, output_loading_info=True, **overrides
        )
    except OSError as error:
        if not folder.exists() and checkpoint.count("/") <= 1 and not checkpoint.startswith((".", "/")):
            raise RunError(f"Could not fetch {checkpoint} from the hub: {_first_line(error)}") from error
        raise InputError(f"{checkpoint} cannot be loaded: {_first_line(error)}") from error
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{checkpoint} is no whole semantic segmentation checkpoint: {_first_line(error)}") from error
    mismatched = sorted(key for key, *_ in loaded["mismatched_keys"])
    encoder = [key for key in mismatched if key.startswith(f"{model.base_model_prefix}.")]
    if encoder:
        raise InputError(
            f"{checkpoint} holds {len(encoder)} encoder weights of another shape ({', '.join(encoder[:3])}): they "
            "would start anew. Leave the sizes as they are in the checkpoint; positions are interpolated for pictures "
            "of any size, so `image_size` stays too."
        )
    lacking = sorted([*loaded["missing_keys"], *(() if overrides.get("ignore_mismatched_sizes") else mismatched)])
    if lacking:
        raise InputError(
            f"{checkpoint} lacks {len(lacking)} weights of {type(model).__name__} ({', '.join(lacking[:3])} ...): "
            "it was saved by another kind of model. Train a segmentation head first."
        )
    return model.eval()


def load_image_processor(checkpoint: str) -> Any:
    """Load the image processor saved beside a model.

    Raises:
        InputError: there is none.
    """
    try:
        return AutoImageProcessor.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{checkpoint} has no image processor (preprocessor_config.json). Save one beside the model."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
