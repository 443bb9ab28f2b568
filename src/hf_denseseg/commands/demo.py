"""`denseseg demo`: from recipe to prediction on embedded images, offline, in a few minutes on two cores."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from hf_denseseg.errors import RunError
from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION, TASKS

RECIPES = Path(__file__).parent

# Runs in a new process, which knows nothing but what was saved.
RELOAD = """
import sys
from pathlib import Path
import hf_denseseg, transformers
auto_class, kind, loader, folder, output, dataset, split = sys.argv[1:]
model = getattr(transformers, auto_class).from_pretrained(folder)
processor = transformers.AutoImageProcessor.from_pretrained(folder)
predict = transformers.pipeline(kind, model=model, image_processor=processor)
data = getattr(hf_denseseg, loader)(dataset, split, limit=4)
output = Path(output)
output.mkdir(exist_ok=True)
for row in data.dataset:
    name = row["id"].replace("/", "_")
    row["image"].save(output / f"{name}.png")
    predictions = predict(row["image"])
    for number, found in enumerate(predictions):
        if "mask" in found:
            found["mask"].save(output / f"{name}_{number}_{found['label']}.png")
    if kind == "image-classification":
        predictions = predictions[:1]
        name += f" ({data.spec.classes[row['label']]})"
    scores = [" %.0f %%" % (100 * found["score"]) if found.get("score") is not None else "" for found in predictions]
    labels = [found["label"] + score for found, score in zip(predictions, scores)]
    print(f"  {name}: {', '.join(labels) or 'nothing'}")
"""


EPILOG = """examples:
  denseseg demo --output_dir runs/demo
  denseseg demo --task image-classification --output_dir runs/demo-classification
  denseseg demo --model segformer-b0   a model of transformers
  denseseg demo --max_steps 50         any key of a recipe"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `demo` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="train, evaluate, save, reload and use a small model on embedded data",
        description="Train a small model on embedded drawings of streets, evaluate it per class, save it, load it in "
        "a new process through the Auto classes and the pipeline, and write predictions and one HTML page.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--task",
        choices=tuple(TASKS),
        metavar="TASK",
        default=SEMANTIC_SEGMENTATION,
        help="task to learn: %(choices)s (default: %(default)s)",
    )
    parser.add_argument(
        "--output_dir", metavar="FOLDER", default="runs/demo", help="run folder to write (default: %(default)s)"
    )
    parser.set_defaults(takes_overrides=True)


def main(args: argparse.Namespace) -> int:
    """Run the demo and print what it found."""
    from hf_denseseg.evaluation.score_names import SCORE_NAMES, chance_level
    from hf_denseseg.training.recipe import load_recipe
    from hf_denseseg.training.run import train

    output, names = Path(args.output_dir), TASKS[args.task]
    path = RECIPES / f"demo_{args.task.replace('-', '_')}.yaml"
    recipe = load_recipe(path, [*args.overrides, "--output_dir", str(output)])
    results = train(recipe)
    print(f"\nLoaded in a new process, {names.auto_class} and pipeline({names.pipeline!r}) find:", flush=True)
    found = output / "masks" if "segmentation" in args.task else output / "found"
    split = "train" if recipe.data.eval_split == "train" else "test"  # a model that overfits is shown on what it saw
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
            f"The saved model in {output / 'model'} could not be used by the pipeline: the lines above say why."
        )
    key, label = SCORE_NAMES[args.task].main_metric
    print(f"\n{label} {100 * results['scores'][key]:.1f} %. {chance_level(args.task, results['scores'])}")
    print(f"Images, table and learning curve: {output / 'index.html'}; predictions: {found}")
    return 0
