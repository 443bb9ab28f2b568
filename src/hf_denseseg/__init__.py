"""Dense prediction for transformers: DSCT, SETR + HLG, UN-EPT and HFGD."""

import importlib
from typing import Any

from hf_denseseg.inference.mixed_sizes import register_pipelines
from hf_denseseg.models.auto.example import example_checkpoint
from hf_denseseg.models.auto.registration import (
    create_config,
    create_image_processor,
    create_model,
    list_models,
    load_official,
    model_info,
    register,
)
from hf_denseseg.models.auto.remote_code import write_code

__version__ = "0.1.0"

_CLASSES = register()
register_pipelines()
globals().update(_CLASSES)

__all__ = [
    "create_config",
    "create_image_processor",
    "create_model",
    "example_checkpoint",
    "list_models",
    "load_classification",
    "load_detection",
    "load_official",
    "load_segmentation",
    "model_info",
    "write_code",
    *_CLASSES,
]


def __getattr__(name: str) -> Any:
    # `datasets` is an extra and slow to import: only who asks for data pays for it.
    if name in ("load_segmentation", "load_classification", "load_detection"):
        return getattr(importlib.import_module(f"hf_denseseg.data.{name.removeprefix('load_')}"), name)
    raise AttributeError(f"module 'hf_denseseg' has no attribute {name!r}")
