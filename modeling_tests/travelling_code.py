"""Load a checkpoint by `trust_remote_code=True` where this package and its extras are not installed."""

import sys
from pathlib import Path

import torch
from transformers.dynamic_module_utils import get_imports

import new_python

# Beside the standard library: what a model of this package needs, and what transformers itself needs.
INSTALLED = {"torch", "torchvision", "timm", "transformers", "huggingface_hub", "numpy", "PIL"}
SCRIPT = """
import sys
import torch
for name in ("hf_denseseg", "denseseg_command", "datasets", "evaluate", "scipy", "pycocotools", "kernels", "rasterio"):
    assert name not in sys.modules or name in ("scipy", "datasets"), name
    sys.modules[name] = None  # importing it fails
import transformers
import transformers.dynamic_module_utils
folder, auto_class, modules, inputs, output = sys.argv[1:]
transformers.dynamic_module_utils.HF_MODULES_CACHE = modules
model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules."), type(processor)
image = torch.zeros(3, 40, 50, dtype=torch.uint8)
assert processor(image, return_tensors="pt")["pixel_values"].shape[:2] == (1, 3)
with torch.no_grad():
    torch.save(model(torch.load(inputs)).logits, output)
"""


def logits_without_the_package(
    folder: Path, pixel_values: torch.Tensor, auto_class: str = "AutoModelForSemanticSegmentation"
) -> torch.Tensor:
    """Logits of a saved model and image processor with their code, see `write_code`, in a process of their own."""
    for path in folder.glob("*.py"):  # what transformers would miss when the folder comes from the hub
        assert set(get_imports(path)) <= INSTALLED | sys.stdlib_module_names, path
    inputs, output = folder.parent / "inputs.pt", folder.parent / "logits.pt"
    torch.save(pixel_values, inputs)
    done = new_python.run(["-c", SCRIPT, folder, auto_class, folder.parent / "modules", inputs, output])
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output)
