"""Images per second in training on a CPU: a recipe as one thread runs it, against more threads and other settings.

Every variant is a process of its own that trains the recipe for a few steps, one after the other, in several rounds.
A step is timed from the end of one to the end of the next, so that waiting for data counts; the median over the steps
of all rounds is taken. CPU seconds are those of the training process. The mean loss of the timed steps shows that all
variants learn alike: they draw the same images and weights and differ in rounding only (with bfloat16 in more; with a
frozen encoder, where that has trained weights, in what learns).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
RECIPES = {
    "dsct_tiny_sac_camvid_cpu": ROOT / "recipes" / "dsct" / "dsct_tiny_sac_camvid_cpu.yaml",
    "hfgd_lite0_camvid_cpu": ROOT / "recipes" / "hfgd" / "hfgd_lite0_camvid_cpu.yaml",
}
WARMUP_STEPS = 4
# Name -> threads (None: as many as the processor has cores), and keys of the recipe.
VARIANTS: dict[str, tuple[int | None, list[str]]] = {
    "one thread": (1, []),
    "one thread, channels_last": (1, ["--channels_last"]),
    "one thread, bfloat16": (1, ["--bf16"]),
    "one thread, compiled": (1, ["--torch_compile"]),
    "one thread, encoder frozen": (1, ["--freeze", "encoder"]),
    "all threads": (None, []),
    "all threads, channels_last": (None, ["--channels_last"]),
    "all threads, channels_last, bfloat16": (None, ["--channels_last", "--bf16"]),
}
CHILD = """
import json, sys, time
from transformers import TrainerCallback
from hf_denseseg.training import run
from hf_denseseg.cli import main

class Clock(TrainerCallback):
    ends = []
    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append((time.perf_counter(), time.process_time()))

def timed(*args, build_trainer=run.build_trainer):
    trainer = build_trainer(*args)
    trainer.add_callback(Clock())
    return trainer

run.build_trainer = timed
assert main(sys.argv[1:]) == 0
print("clock", json.dumps(Clock.ends))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", choices=list(RECIPES), help="recipe to train")
    parser.add_argument("--data", type=Path, required=True, help="folder of CamVid, 11 classes")
    parser.add_argument("--encoder_weights", help="for the recipe with EfficientNet-Lite0")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each run (default 20)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant (default 3)")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="these only (default: all that apply)")


def result_name(args: argparse.Namespace) -> str:
    return f"training_throughput_{args.recipe}"


def train(args: argparse.Namespace, variant: str, folder: Path) -> dict[str, list[float] | float]:
    """Seconds and CPU seconds of the timed steps, and their mean loss."""
    threads, keys = VARIANTS[variant]
    words = ["train", str(RECIPES[args.recipe]), "--dataset", str(args.data), "--output_dir", str(folder), "--use_cpu"]
    words += ["--max_steps", str(WARMUP_STEPS + args.steps), "--eval_strategy", "no", "--max_eval_samples", "1"]
    words += ["--logging_steps", "1", "--warmup_steps", "2", *keys]
    if args.encoder_weights:
        words += ["--encoder_weights", args.encoder_weights]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads or os.cpu_count())}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *words], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("clock"))
    ends = json.loads(line.removeprefix("clock"))[WARMUP_STEPS - 1 :]
    wall, cpu = ([after[k] - before[k] for before, after in zip(ends, ends[1:], strict=False)] for k in (0, 1))
    history = json.loads((folder / "results.json").read_text())["history"]
    losses = [entry["loss"] for entry in history if "loss" in entry][WARMUP_STEPS:]
    return {"seconds": wall, "cpu_seconds": cpu, "loss": statistics.mean(map(float, losses))}


def run(args: argparse.Namespace) -> dict:
    """Figures of each variant, and the recipe."""
    trained = [name for name in VARIANTS if args.encoder_weights or "frozen" not in name]
    runs: dict[str, list[dict]] = {variant: [] for variant in args.variants or trained}
    for number in range(args.rounds):
        for variant in runs:
            with tempfile.TemporaryDirectory() as folder:
                runs[variant].append(train(args, variant, Path(folder) / "run"))
            print(
                f"round {number + 1}, {variant}: {statistics.median(runs[variant][-1]['seconds']):.3f} s", flush=True
            )
    batch = yaml.safe_load(RECIPES[args.recipe].read_text())["per_device_train_batch_size"]
    figures: dict[str, dict[str, float]] = {}
    for variant, each in runs.items():
        seconds = statistics.median([one for run in each for one in run["seconds"]])
        cpu_seconds = statistics.median([one for run in each for one in run["cpu_seconds"]])
        figures[variant] = {
            "images_per_second": batch / seconds,
            "images_per_cpu_second": batch / cpu_seconds,
            "loss": statistics.mean(run["loss"] for run in each),
        }
    base = figures[next(iter(figures))]["images_per_second"]
    for each in figures.values():
        each["speedup"] = each["images_per_second"] / base
    return {"recipe": args.recipe, "variants": figures}


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of the README."""
    figures = result["figures"]["variants"]
    base, *others = figures
    shown = ", ".join(f"{name} {figures[name]['speedup']:.2f}x" for name in others)
    return [(f"`{result['figures']['recipe']}`, images per second in training", shown, f"the same recipe, {base}")]
