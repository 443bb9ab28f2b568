"""All GPU work in one command, most valuable first, so that a short loan of a GPU is enough.

    python scripts/gpu_session.py --minutes 12 --output runs/gpu --camvid path/to/camvid
    python scripts/gpu_session.py --dry_run --output runs/dry      every stage in miniature, on a CPU

`gpu_session.md` says how to prepare a machine. Stages, each in processes of its own with a time limit: `tests` (those
marked `gpu`; with two GPUs also DDP and FSDP over NCCL), `attention` (deformable attention: Triton against its peers),
`steps` (forward and training step of one variant per family, bfloat16), and `camvid` (training from random weights;
the number of steps is chosen to fill the time that is left; with test images beside train and val, on train and on
train+val, each evaluated on the test images too). `session.json` is written after every command, so a session that is
cut keeps what was done.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = [sys.executable, "scripts/benchmark.py"]
TRAIN = [sys.executable, "scripts/train.py"]
EVALUATE = [sys.executable, "-m", "hf_denseseg.cli", "evaluate"]
STAGES = ("tests", "attention", "steps", "camvid")
# Variant, image size of the paper's protocol, images per step.
STEPS = (
    ("dsct-base-sac", 512, 8),
    ("unept-resnet50", 480, 8),
    ("hfgd-resnet50", 513, 8),
    ("hlg-pup-medium", 512, 8),
    ("setr-pup-vit-large", 512, 8),
)
RECIPE = "scripts/recipes/dsct/dsct_small_sac_camvid.yaml"
# In miniature: shapes of the attention, variants, training.
DRY_ATTENTION = ["--cases", "unept-encoder-deit", "--batch_size", "1", "--repeats", "1", "--device", "cpu"]
DRY_STEPS = (("dsct-tiny-sac", 64, 1), ("hfgd-resnet50", 65, 1))
DRY_STEP = ["--repeats", "1", "--device", "cpu", "--num_labels", "5"]
DRY_TRAIN = [
    *("--crop_size", "64", "64", "--per_device_train_batch_size", "2", "--class_weights", "null", "--use_cpu"),
    *("--max_train_samples", "4", "--max_eval_samples", "2", "--config_overrides", "{num_hidden_layers: 6}"),
]
DRY_DATA, DRY_STEPS_TRAINED = "synthetic:4@64x96", 2
TRIALS = (20, 80)  # steps of two short runs, whose difference is the time of a step without the start
EVALUATION = 40  # seconds kept for start, evaluation and reports


class Session:
    """Runs commands against one clock and writes down what became of each."""

    def __init__(self, minutes: float, output: Path) -> None:
        self.end, self.output = time.monotonic() + 60 * minutes, output
        self.commands: list[dict[str, Any]] = []
        output.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    def run(self, name: str, words: list[str], limit: float) -> bool:
        """Run a command for at most `limit` seconds, output to `<name>.log`; True if it ended well."""
        limit = min(limit, self.left())
        row: dict[str, Any] = {"name": name, "command": shlex.join(["python", *words[1:]]), "limit_seconds": limit}
        self.commands.append(row)
        if limit < 5:
            row["state"] = "no time left"
        else:
            start = time.monotonic()
            with (self.output / f"{name}.log").open("w") as log:
                try:
                    done = subprocess.run(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=limit)
                    row["state"] = "done" if done.returncode == 0 else f"exit code {done.returncode}"
                except subprocess.TimeoutExpired:
                    row["state"] = "stopped at its limit"
            row["seconds"] = round(time.monotonic() - start, 1)
        (self.output / "session.json").write_text(json.dumps({"commands": self.commands}, indent=1) + "\n")
        print(f"{name}: {row['state']}, {row.get('seconds', 0)} s, {self.left():.0f} s left", flush=True)
        return row["state"] == "done"


def train(session: Session, args: argparse.Namespace) -> None:
    """CamVid from random weights: two short runs for the time of a step, then one for each part of the data."""
    data = DRY_DATA if args.dry_run else str(args.camvid)
    words = [*TRAIN, RECIPE, "--dataset", data, "--bf16", *shlex.split(args.train_options)]
    words += DRY_TRAIN if args.dry_run else []
    seconds = []
    for steps in TRIALS if args.camvid_steps is None else ():
        folder = session.output / f"trial_{steps}"
        short = ["--max_steps", str(steps), "--eval_strategy", "no", "--save_strategy", "no", "--warmup_steps", "5"]
        if not session.run(f"camvid_trial_{steps}", [*words, *short, "--output_dir", str(folder)], 120):
            return
        history = json.loads((folder / "results.json").read_text())["history"]
        seconds.append(next(row["train_runtime"] for row in history if "train_runtime" in row))
    if args.only_trial:
        return
    has_test = args.dry_run or (args.camvid / "test").exists()
    splits = args.camvid_splits or (["train", "train+val"] if has_test else ["train"])
    for number, split in enumerate(splits):
        share = session.left() / (len(splits) - number)
        steps = args.camvid_steps
        if steps is None:
            per_step = (seconds[1] - seconds[0]) / (TRIALS[1] - TRIALS[0])
            steps = max(int((share - EVALUATION) / per_step), 1)
            print(f"{1e3 * per_step:.0f} ms per step: {steps} steps on {split}")
        name = f"camvid_{split.replace('+', '_')}"
        options = ["--max_steps", str(steps), "--eval_steps", str(steps), "--warmup_steps", str(max(steps // 20, 1))]
        options += ["--train_split", split, "--output_dir", str(session.output / name)]
        if session.run(name, [*words, *options], share) and has_test:
            test = [str(session.output / name / "model"), "--dataset", data, "--eval_split", "test"]
            test += ["--max_eval_samples", "2", "--use_cpu"] if args.dry_run else []
            session.run(f"{name}_test", [*EVALUATE, *test, "--output_dir", str(session.output / f"{name}_test")], 60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12, help="minutes for everything (default 12)")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of results and logs")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--dry_run", action="store_true", help="every stage in miniature, on a CPU")
    parser.add_argument("--camvid", type=Path, help="CamVid at 360x480; without it there is no training")
    parser.add_argument("--camvid_steps", type=int, help="steps of the training instead of what fits into the time")
    parser.add_argument("--camvid_splits", nargs="+", help="default: train; with a test folder: train train+val")
    parser.add_argument("--train_options", default="", help="options of the training, such as '--channels_last'")
    parser.add_argument("--only_trial", action="store_true", help="measure the time of a training step, do not train")
    parser.add_argument("--peer", type=Path, help="folder of a build of kernels-community/deformable-detr")
    parser.add_argument("--compile", choices=["none", "forward", "both"], default="none", help="in the stage `steps`")
    args = parser.parse_args()
    if args.dry_run and args.camvid_steps is None:
        args.camvid_steps = DRY_STEPS_TRAINED
    session = Session(args.minutes, args.output.resolve())
    if "tests" in args.stages:
        session.run("tests", [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "modeling_tests"], 120)
    if "attention" in args.stages:
        peer = ["--peer", str(args.peer.resolve())] if args.peer else []
        output = ["--output", str(session.output / "msda_cuda.json")]
        small = DRY_ATTENTION if args.dry_run else []
        session.run("attention", [*BENCHMARK, *output, "msda_cuda", *peer, *small], 180)
    variants = DRY_STEPS if args.dry_run else STEPS
    for variant, side, images in variants if "steps" in args.stages else ():
        output = ["--output", str(session.output / f"cuda_{variant}.json")]
        sizes = ["--image_size", str(side), str(side), "--batch_size", str(images), "--compile", args.compile]
        sizes += DRY_STEP if args.dry_run else []
        session.run(f"step_{variant}", [*BENCHMARK, *output, "cuda_step", variant, *sizes], 150)
    if "camvid" in args.stages and (args.camvid or args.dry_run):
        train(session, args)


if __name__ == "__main__":
    main()
