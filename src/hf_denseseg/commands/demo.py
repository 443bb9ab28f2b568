"""`denseseg demo`: the whole road on embedded street scenes, offline, in a few minutes on two cores."""

import argparse
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hf_denseseg.errors import RunError

logger = logging.getLogger(__name__)

RECIPE = Path(__file__).with_name("demo.yaml")

# Runs in a process of its own: what was saved must be enough.
RELOAD = """
import sys
from pathlib import Path
import hf_denseseg
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline
folder, output = map(Path, sys.argv[1:])
model = AutoModelForSemanticSegmentation.from_pretrained(folder)
processor = AutoImageProcessor.from_pretrained(folder)
segment = pipeline("image-segmentation", model=model, image_processor=processor)
data = hf_denseseg.load_segmentation("synthetic", split="test")
output.mkdir(exist_ok=True)
for index in range(4):
    row = data.dataset[index]
    row["image"].save(output / f"{row['id']}.png")
    masks = segment(row["image"])
    for found in masks:
        found["mask"].save(output / f"{row['id']}_{found['label']}.png")
    print(f"  {row['id']}: " + ", ".join(found["label"] for found in masks))
"""


def add_parser(subparsers: Any) -> None:
    """Add `demo` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="train, evaluate, save, reload and segment on embedded data",
        description="Train a small DSCT on embedded synthetic street scenes, evaluate it per class, save it, load it "
        "in a new process through the Auto classes and the pipeline, and write pictures and one HTML page.",
        epilog="example: denseseg demo --output runs/demo   (recipe keys can be given as well: --max_steps 50)",
    )
    parser.add_argument("--output", default="runs/demo", help="run folder (default: %(default)s)")
    parser.set_defaults(takes_overrides=True)


def main(args: argparse.Namespace) -> int:
    """Run the demo and say what came out."""
    from hf_denseseg.experiment import train
    from hf_denseseg.recipe import load_recipe
    from hf_denseseg.tasks import get_task

    output = Path(args.output)
    results = train(load_recipe(RECIPE, [*args.overrides, "--output_dir", str(output)]))
    print("\nLoaded in a new process, AutoModelForSemanticSegmentation and pipeline('image-segmentation') find:")
    command = [sys.executable, "-c", RELOAD, str(output / "model"), str(output / "masks")]
    if subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False).returncode:
        raise RunError(
            f"The saved model in {output / 'model'} could not be used by the pipeline; see the lines above."
        )
    task = get_task(results["task"])
    key, label = next(iter(task.metrics.items()))
    print(f"\n{label} {100 * results['scores'][key]:.1f} %. {task.chance(results['scores'])}")
    print(f"Pictures, table and learning curve: {output / 'index.html'}; masks: {output / 'masks'}")
    return 0
