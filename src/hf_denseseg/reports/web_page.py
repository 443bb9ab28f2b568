"""A page that segments images in the browser, beside the exported model that it runs."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from hf_denseseg.data.labels import LabelSpec, color_wheel
from hf_denseseg.errors import InputError
from hf_denseseg.inference.export.web_runtime import WebRuntime, find_runtime
from hf_denseseg.models.auto.pretrained import read_config
from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION
from hf_denseseg.models.channels import image_channels
from hf_denseseg.models.one_logit import class_names
from hf_denseseg.reports.rendering import render

LONGEST_SIDE = 1024
"""Pixels of an image's longer side above which the page makes it smaller: WebAssembly has 4 GB of memory at most."""


def prepare_page(format_name: str, checkpoint: str, task: str, runtime: str | None) -> WebRuntime | None:
    """Find what a page needs, before the model is exported; other formats than `"web"` need nothing.

    Args:
        format_name: of the export.
        checkpoint: folder or hub id.
        task: of the checkpoint.
        runtime: see `find_runtime`.

    Raises:
        InputError: the model is not for semantic segmentation of RGB images, or onnxruntime-web is not there; or it
            is given for another format.
    """
    if format_name != "web":
        if runtime:
            raise InputError("--onnxruntime_web is for --format web. Leave it out.")
        return None
    if task != SEMANTIC_SEGMENTATION:
        raise InputError(
            f"--format web is for {SEMANTIC_SEGMENTATION}; {checkpoint} is for {task}. Give --format onnx."
        )
    if (channels := image_channels(read_config(checkpoint))) != 3:
        raise InputError(
            f"--format web is for RGB images, which browsers read; those of {checkpoint} have {channels} channels. "
            "Give --format onnx."
        )
    return find_runtime(runtime)


def add_page(folder: Path, config: PreTrainedConfig, record: dict[str, Any], runtime: WebRuntime) -> None:
    """Write page and runtime beside an exported model, and the runtime's version into its record.

    Args:
        folder: of the export.
        config: of the model.
        record: content of `export.json`.
        runtime: see `prepare_page`.
    """
    for name, content in runtime.files.items():
        (folder / name).write_bytes(content)
    record["versions"]["onnxruntime-web"] = runtime.version
    (folder / "index.html").write_text(page_text(folder, class_names(config), record["size"], runtime.version))


def page_text(folder: Path, names: list[str], size: list[int] | None, runtime_version: str) -> str:
    """The page as HTML; it asks for files of its own folder only.

    Args:
        folder: of the export; colors come from its `labels.json`, if there is one for these classes.
        names: of the classes.
        size: `(height, width)` of the only images that the model takes, which the page resizes images to.
        runtime_version: of onnxruntime-web.
    """
    palette, saved = color_wheel(len(names)), folder / "labels.json"
    if saved.exists() and len(colors := LabelSpec.from_file(saved).palette) == len(names):
        palette = colors
    settings: dict[str, Any] = {
        "classes": [{"name": name, "color": list(color)} for name, color in zip(names, palette, strict=True)],
        "size": size,
        "longestSide": LONGEST_SIDE,
    }
    # No text of a class name can end the script element.
    data = json.dumps(settings).replace("<", "\\u003c")
    return render("web_page.html", settings=data, longest_side=LONGEST_SIDE, size=size, runtime=runtime_version)
