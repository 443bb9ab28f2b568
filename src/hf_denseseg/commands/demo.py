"""`denseseg demo`: the whole road on embedded pictures, offline, in a few minutes on two cores."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hf_denseseg.errors import RunError
from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION, TASKS

RECIPES = Path(__file__).parent

# Runs in a process of its own: what was saved must be enough.
RELOAD = """
import sys
from pathlib import Path
import hf_denseseg, transformers
auto_class, kind, loader, folder, output, dataset, split = sys.argv[1:]
model = getattr(transformers, auto_class).from_pretrained(folder)
processor = transformers.AutoImageProcessor.from_pretrained(folder)
find = transformers.pipeline(kind, model=model, image_processor=processor)
data = getattr(hf_denseseg, loader)(dataset, split, limit=4)
output = Path(output)
output.mkdir(exist_ok=True)
for row in data.dataset:
    name = row["id"].replace("/", "_")
    row["image"].save(output / f"{name}.png")
    answers = find(row["image"])
    for place, found in enumerate(answers):
        if "mask" in found:
            found["mask"].save(output / f"{name}_{place}_{found['label']}.png")
    if kind == "image-classification":
        answers = answers[:1]
        name += f" ({data.spec.classes[row['label']]})"
    scores = [" %.0f %%" % (100 * found["score"]) if found.get("score") is not None else "" for found in answers]
    print(f"  {name}: " + (", ".join(found["label"] + score for found, score in zip(answers, scores)) or "nothing"))
"""


EPILOG = """examples:
  denseseg demo --output runs/demo
  denseseg demo --task image-classification --output runs/demo-classification
  denseseg demo --max_steps 50                              recipe keys can be given as well"""


def add_parser(subparsers: Any) -> None:
    """Add `demo` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="train, evaluate, save, reload and use a small model on embedded data",
        description="Train a small model on embedded drawn pictures, evaluate it per class, save it, load it in a new "
        "process through the Auto classes and the pipeline, and write pictures and one HTML page.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--task", choices=tuple(TASKS), default=SEMANTIC_SEGMENTATION, help="what is learned (default: %(default)s)"
    )
    parser.add_argument("--output", default="runs/demo", help="run folder (default: %(default)s)")
    parser.set_defaults(takes_overrides=True)


def main(args: argparse.Namespace) -> int:
    """Run the demo and say what came out."""
    from hf_denseseg.evaluation.score_names import SCORE_NAMES, chance_level
    from hf_denseseg.training.recipe import load_recipe
    from hf_denseseg.training.run import train

    output, names = Path(args.output), TASKS[args.task]
    path = RECIPES / f"demo_{args.task.replace('-', '_')}.yaml"
    recipe = load_recipe(path, [*args.overrides, "--output_dir", str(output)])
    results = train(recipe)
    print(f"\nLoaded in a new process, {names.auto_class} and pipeline({names.pipeline!r}) find:", flush=True)
    found = output / "masks" if "segmentation" in args.task else output / "found"
    split = "train" if recipe.data.eval_split == "train" else "test"  # what is learned by heart is shown
    data = (recipe.data.dataset, split)
    command = [
        sys.executable,
        "-c",
        RELOAD,
        names.auto_class,
        names.pipeline,
        names.loader,
        str(output / "model"),
        str(found),
        *data,
    ]
    if subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False).returncode:
        raise RunError(
            f"The saved model in {output / 'model'} could not be used by the pipeline; see the lines above."
        )
    key, label = SCORE_NAMES[args.task].main_metric
    print(f"\n{label} {100 * results['scores'][key]:.1f} %. {chance_level(args.task, results['scores'])}")
    print(f"Pictures, table and learning curve: {output / 'index.html'}; what was found: {found}")
    return 0
