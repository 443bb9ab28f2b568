"""An export as transformers.js reads it: a Segformer, by its configuration and image processor.

transformers.js chooses classes by `model_type` and knows none of ours. Of a Segformer it needs what all per-pixel
models have: `pixel_values` in, `logits` out, at any stride.
"""

import json
from pathlib import Path

from transformers import PreTrainedConfig, SegformerConfig

from hf_denseseg.errors import InputError
from hf_denseseg.files import write_atomic
from hf_denseseg.inference.preprocessing import Preprocessing
from hf_denseseg.models.auto.pretrained import load_image_processor
from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION
from hf_denseseg.models.channels import image_channels
from hf_denseseg.models.one_logit import class_names

RESIZE = ("do_resize", "size", "resample")
VALUES = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def check_segformer(checkpoint: str, task: str, config: PreTrainedConfig, with_argmax: bool) -> None:
    """Refuse what transformers.js cannot run as a Segformer.

    Raises:
        InputError: it says why.
    """
    if task != SEMANTIC_SEGMENTATION:
        raise InputError(
            f"--format transformers_js is for {SEMANTIC_SEGMENTATION}; this checkpoint is for "
            f"{task}. Give --format onnx."
        )
    if with_argmax:
        raise InputError("transformers.js chooses the classes itself, from logits. Leave --with_argmax out.")
    if config.num_labels == 1:
        raise InputError("transformers.js needs one logit per class; this model has one for two. Give --format onnx.")
    preprocessing = Preprocessing.from_image_processor(load_image_processor(checkpoint))
    if image_channels(config) != 3 or preprocessing.pixel_format.pixel_range != "uint8" or preprocessing.is_bgr:
        raise InputError(
            f"transformers.js gives a Segformer RGB images of 8 bits; {checkpoint} takes others. Give --format onnx."
        )


def write_segformer(folder: Path, checkpoint: str, config: PreTrainedConfig) -> None:
    """Write configuration and image processor of a Segformer with the classes and sizes of a checkpoint."""
    processor = load_image_processor(checkpoint).to_dict()
    segformer = SegformerConfig(id2label=dict(enumerate(class_names(config))))
    segformer.architectures = ["SegformerForSemanticSegmentation"]
    # Browsers would ask for a quantized file.
    fields = {**segformer.to_dict(), "transformers.js_config": {"dtype": "fp32"}}
    kept = {name: processor[name] for name in (*RESIZE, *VALUES) if name in processor}
    kept["image_processor_type"] = "SegformerImageProcessor"
    for name, values in (("config.json", fields), ("preprocessor_config.json", kept)):
        write_atomic(folder / name, json.dumps(values, indent=1) + "\n")
