"""What the figures of a run depend on besides its recipe: versions, commit, machine. `results.json` names them."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainingArguments

from hf_denseseg import __version__

PACKAGE = Path(__file__).resolve().parents[1]
OTHERS = {"mps": "Apple GPU", "xpu": "Intel GPU", "npu": "Ascend NPU"}  # devices besides CUDA, by torch's name


def versions() -> dict[str, str]:
    """Versions of this package and of what it runs on; in a git checkout the commit too, "-dirty" if files differ."""
    commit = checked_out_commit(PACKAGE)
    return {
        "hf_denseseg": __version__,
        **({"commit": commit} if commit else {}),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def machine(args: TrainingArguments) -> dict[str, Any]:
    """The hardware of a run: `processor`, `accelerator` (None if it ran without one), `threads`, `processes`."""
    device = args.device
    return {
        "processor": processor_name(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else OTHERS.get(device.type),
        "threads": torch.get_num_threads(),
        "processes": args.world_size,
    }


def processor_name() -> str:
    """Name of the CPU as the system reports it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def checked_out_commit(folder: Path) -> str | None:
    """Hash of the commit that holds a package folder, with "-dirty" if tracked files differ from it.

    Returns:
        None without git, and if the folder belongs to no repository: an installed copy inside of one does not.
    """
    tracked = _git(folder, "ls-files", "--error-unmatch", "__init__.py")
    return tracked and _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *words: str) -> str | None:
    """What a command of git prints; None if it fails, or there is no git."""
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
