"""Checkpoints that `trust_remote_code=True` loads where nobody imported this package (it must be installed)."""

import json
from pathlib import Path
from typing import Any

from hf_denseseg.files import write_atomic
from hf_denseseg.models.auto.registration import auto_models, family_classes

SHIM = "modeling_hf_denseseg"
TEXT = (
    '"""Points the Auto classes to the installed package (pip install hf-denseseg)."""\n\nfrom hf_denseseg import {}\n'
)


def write_shim(folder: str | Path) -> None:
    """Add the shim module to a saved model, and name its classes in `config.json` and `preprocessor_config.json`.

    Args:
        folder: what `save_pretrained` of a model (and of its image processor, if there is one) wrote.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    classes = family_classes(config["model_type"])
    prefix = next(name for name in classes if name.endswith("Config")).removesuffix("Config")
    saved = config.get("architectures") or []
    # An `auto_map` has room for one class per Auto class: the one that was saved, else the family's first.
    models = {
        auto_class: next((name for name in names if name in saved), names[0])
        for auto_class, names in auto_models(classes).items()
    }
    names = {"AutoConfig": f"{prefix}Config", **models}
    processor = f"{prefix}ImageProcessor"
    write_atomic(folder / f"{SHIM}.py", TEXT.format(", ".join(sorted({*names.values(), processor}))))
    _add_auto_map(folder / "config.json", names)
    if (folder / "preprocessor_config.json").exists():
        _add_auto_map(folder / "preprocessor_config.json", {"AutoImageProcessor": processor})


def _add_auto_map(path: Path, names: dict[str, str]) -> None:
    content: dict[str, Any] = json.loads(path.read_text())
    content["auto_map"] = {auto_class: f"{SHIM}.{name}" for auto_class, name in names.items()}
    write_atomic(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
