"""Checkpoints with their code: `trust_remote_code=True` loads them where this package is not installed.

A checkpoint gets the modules that its classes need as files beside each other, with relative imports, and one module
that the Auto classes open. That module prefers the installed package.
"""

import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_denseseg.files import write_atomic
from hf_denseseg.models.auto.registration import auto_models, family_classes

ENTRY = "modeling_hf_denseseg"
PACKAGE = "hf_denseseg"
TEXT = '''"""Gives the Auto classes the package hf-denseseg if it is installed, or else the code beside this file."""

try:
    from hf_denseseg import {names}
except ImportError:
{fallback}
'''


def write_code(folder: str | Path) -> None:
    """Add its code to a saved model, and name its classes in `config.json` and `preprocessor_config.json`.

    Args:
        folder: what `save_pretrained` of a model (and of its image processor, if there is one) wrote; its files are
            changed in place.
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
    needed = sorted({*names.values(), processor})
    for module in modules_of(classes[name].__module__ for name in needed):
        write_atomic(folder / f"{file_of(module)}.py", relative_source(module))
    imports = [f"    from .{file_of(classes[name].__module__)} import {name}" for name in needed]
    text = TEXT.format(names=", ".join(needed), fallback="\n".join(imports))
    write_atomic(folder / f"{ENTRY}.py", text)
    _add_auto_map(folder / "config.json", names)
    if (folder / "preprocessor_config.json").exists():
        _add_auto_map(folder / "preprocessor_config.json", {"AutoImageProcessor": processor})


def modules_of(start: Iterable[str]) -> list[str]:
    """Names of some modules of this package, and of all others that they import, sorted."""
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            tree = ast.parse(_source(name))
            imports = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
            waiting += [module for module in imports if module.startswith(f"{PACKAGE}.")]
    return sorted(found)


def file_of(module: str) -> str:
    """Name of a module beside a checkpoint, where there are no folders: the last part of its name."""
    return module.rpartition(".")[2]


def relative_source(module: str) -> str:
    """Source of a module whose imports from this package are relative."""
    text = re.sub(
        rf"^(\s*)from ({PACKAGE}\.[\w.]+) import",
        lambda found: f"{found[1]}from .{file_of(found[2])} import",
        _source(module),
        flags=re.MULTILINE,
    )
    version = importlib.import_module(PACKAGE).__version__
    return f"# {module} of hf-denseseg {version} (Apache-2.0), with relative imports.\n{text}"


def _source(module: str) -> str:
    return inspect.getsource(importlib.import_module(module))


def _add_auto_map(path: Path, names: dict[str, str]) -> None:
    content: dict[str, Any] = json.loads(path.read_text())
    content["auto_map"] = {auto_class: f"{ENTRY}.{name}" for auto_class, name in names.items()}
    write_atomic(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


__all__ = ["file_of", "modules_of", "relative_source", "write_code"]
