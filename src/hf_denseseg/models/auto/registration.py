"""Find every family below `models/`, register it with the Auto classes, and build models by their published names."""

import copy
import fnmatch
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoVideoProcessor, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto import modeling_auto

from hf_denseseg.errors import InputError, unknown_name
from hf_denseseg.models.auto.tasks import TASKS
from hf_denseseg.models.channels import image_channels, set_image_channels
from hf_denseseg.models.flops import ModelInfo, count_forward


def families() -> list[str]:
    """Return the sorted names of the folders below `models/` that hold a `configuration_<family>.py`."""
    folder = Path(__file__).parents[1]
    return sorted(path.parent.name for path in folder.glob("*/configuration_*.py"))


def is_own(config: PreTrainedConfig) -> bool:
    """Return whether a configuration is of a family of this package, not of another model of transformers."""
    return config.model_type in families()


def family_module(family: str, part: str) -> ModuleType:
    """Import `models/<family>/<part>_<family>.py`.

    Raises:
        InputError: no family has this name.
    """
    if family not in families():
        raise InputError(unknown_name("family", family, families()))
    return importlib.import_module(f"hf_denseseg.models.{family}.{part}_{family}")


def modeling_modules(family: str) -> list[ModuleType]:
    """Import every `modeling_<family>*.py` of a family, the main one first."""
    folder = family_module(family, "modeling").__name__.rpartition(".")[0]
    names = {each.name for each in pkgutil.iter_modules(importlib.import_module(folder).__path__)}
    return [
        importlib.import_module(f"{folder}.{name}") for name in sorted(names) if name.startswith(f"modeling_{family}")
    ]


def family_classes(family: str) -> dict[str, type]:
    """Return the public classes of a family by name: configuration, models, image processors."""
    parts = [family_module(family, part) for part in ("configuration", "image_processing")]
    modules = [parts[0], *modeling_modules(family), parts[1]]
    public = {name: getattr(module, name) for module in modules for name in module.__all__}
    return {name: each for name, each in public.items() if isinstance(each, type)}


def auto_models(classes: dict[str, type]) -> dict[str, list[str]]:
    """Map the name of each Auto class to the family's classes that it loads; of several, the checkpoint names one."""
    prefix = next(name for name, each in classes.items() if issubclass(each, PreTrainedConfig)).removesuffix("Config")
    pairs = [(auto_class, task.ending) for task in TASKS.values() for auto_class in task.auto_classes]
    found: dict[str, list[str]] = {}
    # In the order of TASKS: without a name in the checkpoint, the Auto class takes the first.
    for auto_class, ending in [*pairs, ("AutoBackbone", "Backbone"), ("AutoModel", "Model")]:
        if prefix + ending in classes:
            found.setdefault(auto_class, []).append(prefix + ending)
    return found


def register() -> dict[str, type]:
    """Register every family with the Auto classes; return its public classes by name. Safe to call again."""
    public: dict[str, type] = {}
    for family in families():
        classes = family_classes(family)
        _register_family(classes)
        public.update(classes)
    return public


class NoVideoProcessor:
    """What `AutoVideoProcessor` finds for our models, which read images.

    Pipelines look for a video processor too. Without an entry they would take it for code of the checkpoint, and ask
    whether to run it.
    """

    @classmethod
    def from_pretrained(cls, checkpoint: Any, *args: Any, **kwargs: Any) -> None:
        """Raise an error, which pipelines pass over.

        Raises:
            InputError: always.
        """
        raise InputError(f"{checkpoint} reads images and has no video processor. Use AutoImageProcessor.")


def _register_family(classes: dict[str, type]) -> None:
    config_class = next(each for each in classes.values() if issubclass(each, PreTrainedConfig))
    prefix, model_type = config_class.__name__.removesuffix("Config"), config_class.model_type
    AutoConfig.register(model_type, config_class, exist_ok=True)
    models = auto_models(classes)
    for auto_class, names in models.items():
        found = tuple(classes[name] for name in names)
        getattr(transformers, auto_class).register(config_class, found if len(found) > 1 else found[0], exist_ok=True)
    for task, described in TASKS.items():
        if models.get(described.auto_class):
            # The pipelines look class names up here, and log an error for a class that is missing. That for images
            # merges the tables of its tasks, of which the last one would hide the others' names.
            same = [each.auto_class for each in TASKS.values() if each.pipeline == described.pipeline]
            names = tuple(name for auto_class in same for name in models.get(auto_class, ()))
            table = getattr(modeling_auto, f"MODEL_FOR_{task.upper().replace('-', '_')}_MAPPING_NAMES")
            table[model_type] = names if len(names) > 1 else names[0]
    AutoVideoProcessor.register(config_class, NoVideoProcessor, exist_ok=True)
    # Named backends, since transformers would take a positional class for the PIL one.
    processors = {"torchvision": f"{prefix}ImageProcessor", "pil": f"{prefix}ImageProcessorPil"}
    AutoImageProcessor.register(
        config_class,
        image_processor_classes={backend: classes[name] for backend, name in processors.items()},
        exist_ok=True,
    )


def _variants() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for family in families():
        for name, fields in family_module(family, "configuration").VARIANTS.items():
            yield name, family, fields


def list_models(pattern: str = "*") -> list[str]:
    """Names of the published variants.

    Args:
        pattern: glob pattern such as `"dsct-*"`.

    Returns:
        The names that match, sorted.
    """
    return sorted(fnmatch.filter((name for name, _, _ in _variants()), pattern))


def _variant(name: str) -> tuple[str, dict[str, Any]]:
    for known, family, fields in _variants():
        if known == name:
            return family, fields
    raise InputError(unknown_name("model", name, list_models()))


def create_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """Build the configuration of a published variant.

    Args:
        name: one of `list_models()`.
        overrides: configuration fields, for example `num_labels=19`; `num_channels` is set in the backbone too.

    Returns:
        A configuration whose `architectures` names the class of its task.

    Raises:
        InputError: unknown name or unknown field; proposes the nearest.
    """
    family, variant = _variant(name)
    config_class = _config_class(family)
    num_channels = overrides.pop("num_channels", None)
    _check_fields(config_class, overrides)
    config = config_class(**{**variant, **overrides})
    if num_channels is not None:
        set_image_channels(config, num_channels)
    return config


def _config_class(family: str) -> type[PreTrainedConfig]:
    return next(
        each
        for each in vars(family_module(family, "configuration")).values()
        if isinstance(each, type) and issubclass(each, PreTrainedConfig) and each.model_type == family
    )


def _check_fields(config_class: type[PreTrainedConfig], fields: Mapping[str, Any]) -> None:
    known = {each for each in dir(config_class()) if not each.startswith("_")}
    for key in fields:
        if key not in known:
            raise InputError(unknown_name(f"{config_class.__name__} field", key, known))


def create_model(name: str, **overrides: Any) -> PreTrainedModel:
    """Build a published variant with random weights; under `torch.device("meta")` without allocating any.

    Args:
        name: one of `list_models()`.
        overrides: configuration fields, for example `num_labels=19`.

    Returns:
        A model of its task, such as `DsctForSemanticSegmentation`, in train mode.

    Raises:
        InputError: unknown name or unknown field; proposes the nearest.
    """
    config = create_config(name, **overrides)
    return _task_class(config)(config)


def _task_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    if not config.architectures:
        raise InputError("The configuration names no task class. Set `architectures`, for example by `create_config`.")
    return family_classes(config.model_type)[config.architectures[0]]


def create_image_processor(name_or_config: str | PreTrainedConfig, **options: Any) -> BaseImageProcessor:
    """Build the image processor (torchvision) of a family.

    Args:
        name_or_config: one of `list_models()`, or a configuration.
        options: its fields, such as `size={"height": 512, "width": 512}`.

    Returns:
        It makes `pixel_values` `(B, 3, H, W)` of images, and label maps of logits.

    Raises:
        InputError: unknown name; proposes the nearest.
    """
    config = create_config(name_or_config) if isinstance(name_or_config, str) else name_or_config
    name = type(config).__name__.removesuffix("Config") + "ImageProcessor"
    processor_class = getattr(family_module(config.model_type, "image_processing"), name)
    if hasattr(config, "align_corners"):
        options.setdefault("align_corners", config.align_corners)
    if hasattr(processor_class, "task_of"):  # families of several tasks
        options.setdefault("task", processor_class.task_of(config))
    return processor_class(**options)


def model_info(
    name_or_config: str | PreTrainedConfig, image_size: tuple[int, int] = (512, 512), **overrides: Any
) -> ModelInfo:
    """Count parameters, multiply-adds and activations for one image, without allocating weights.

    Args:
        name_or_config: one of `list_models()`, or a configuration whose `architectures` names the task class.
        image_size: (height, width) in pixels; of a name whose configuration has an `image_size` (a stored position
            table), that field is set to it, rounded up to whole patches.
        overrides: configuration fields for a name, for example `num_labels=19`.

    Returns:
        A `ModelInfo`.

    Raises:
        InputError: unknown name or unknown field; proposes the nearest.
    """
    config = name_or_config
    # A stored position table fits one size only: count at the size that was asked for, not at that of the variant.
    if isinstance(config, str):
        fields = create_config(config)
        if hasattr(fields, "image_size") and hasattr(fields, "patch_size"):
            overrides["image_size"] = [-(-side // fields.patch_size) * fields.patch_size for side in image_size]
        config = create_config(config, **overrides)
    with torch.device("meta"):
        model = _task_class(config)(config)
    channels = image_channels(config)
    executed = count_forward(model, image_size, channels)
    published = count_forward(reference_implementation(model), image_size, channels)
    return ModelInfo(
        name=name_or_config if isinstance(name_or_config, str) else type(model).__name__,
        image_size=image_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        multiply_adds=family_module(config.model_type, "reference").published_multiply_adds(published),
        executed_multiply_adds=executed.layer_multiply_adds + executed.product_multiply_adds,
        activations=executed.activations,
    )


def reference_implementation(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model that computes the same function as paper or released code write it.

    Every module of a class in `REFERENCE_CLASSES` of `models/<family>/reference_<family>.py` becomes one of the class
    given there; backbones of transformers keep their attention weights in memory too.
    """
    replacements = family_module(model.config.model_type, "reference").REFERENCE_CLASSES
    model = copy.deepcopy(model)
    for module in model.modules():
        # Parameters stay where they are; only `forward` changes.
        module.__class__ = replacements.get(type(module), type(module))
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = "eager"
    return model


def load_official(
    family: str,
    weights: str | Path | Mapping[str, torch.Tensor],
    hyper_parameters: str | Path | Mapping[str, Any],
    **overrides: Any,
) -> PreTrainedModel:
    """Convert the authors' weights to our model, in eval mode.

    Args:
        family: name of a folder below `models/`.
        weights: `.safetensors`, `.pth`, `.bin` or `.tar` file, or a state dict, with the official key names.
        hyper_parameters: sizes under the official names (JSON file or dict), or a published name.
        overrides: configuration fields, for example `num_labels=19`.

    Returns:
        The model; what the weights do not hold, such as a head for other classes, is random.

    Raises:
        InputError: unreadable file, or unused, missing or wrongly shaped keys (all listed in one message).
    """
    convert = family_module(family, "convert")
    _check_fields(_config_class(family), overrides)
    return convert.load_official(weights, hyper_parameters, **overrides)
