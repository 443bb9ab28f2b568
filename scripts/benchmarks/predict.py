"""`denseseg predict`: two processes against one on the same images, and the peak memory of one huge image.

The model is the DSCT of the recipe `dsct_tiny_sac_camvid_cpu` with 19 classes and random weights. Runs with one and
with two processes take turns, one thread each; this script acts as the launcher. "Prediction" is the time that the
command itself reports: reading, model, writing, waiting for the other process. "Command" adds imports and loading.
"CPU" is the process time of prediction in the busiest process, which hardly depends on other load. Peak memory is the
process's.
"""

import argparse
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hf_denseseg.models.auto.registration import create_image_processor, create_model
from hf_denseseg.training.recipe import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "dsct" / "dsct_tiny_sac_camvid_cpu.yaml"
CLASSES, SIZE = 19, (512, 1024)
CHILD = """
import sys, time
from hf_denseseg.inference.predict import prediction
from hf_denseseg.cli import main

def timed(*args, run_prediction=prediction.run_prediction):
    start = time.process_time()
    outcome = run_prediction(*args)
    print("cpu", time.process_time() - start)
    return outcome

prediction.run_prediction = timed
assert main(sys.argv[1:]) == 0
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print("peak", int(status["VmHWM"].split()[0]) / 1024)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=24, help="images of 512x1024 (default 24)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each number of processes (default 3)")
    parser.add_argument("--side", type=int, default=8192, help="side of the huge image (default 8192)")


def save_model(folder: Path) -> None:
    recipe = load_recipe(RECIPE).model
    torch.manual_seed(0)
    model = create_model(recipe.model, num_labels=CLASSES, **recipe.config_overrides)
    model.save_pretrained(folder)
    create_image_processor(model.config, do_resize=False).save_pretrained(folder)


def save_image(path: Path, size: tuple[int, int], seed: int) -> None:
    """Smooth noise with grain, which takes JPEG and PNG about as long as a photograph."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (size[0] // 32, size[1] // 32, 3), dtype=np.uint8))
    image = small.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    image.paste(Image.effect_noise((size[1], size[0]), 40).convert("RGB"), mask=Image.new("L", image.size, 60))
    image.save(path, quality=92)


def predict(words: list[str], count: int) -> dict[str, float]:
    """Run the command in `count` processes; seconds of prediction and of the command, peak MiB of rank 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    started = time.perf_counter()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, "predict", *words],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(count)
    ]
    printed = [process.communicate()[0] for process in ranks]
    assert not any(process.returncode for process in ranks), printed
    took, peak = re.search(r"\(([\d.]+) s\)", printed[0]), re.search(r"peak ([\d.]+)", printed[0])
    busy = [re.search(r"cpu ([\d.]+)", each) for each in printed]
    assert took and peak
    return {
        "prediction_seconds": float(took[1]),
        "command_seconds": time.perf_counter() - started,
        "cpu_seconds": max(float(each[1]) for each in busy if each),
        "peak_mib": float(peak[1]),
    }


def run(args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        save_model(at / "model")
        figures: dict = {"huge_image": huge(at, args.side)} if args.side else {}
        (at / "photos").mkdir()
        for number in range(args.images):
            save_image(at / "photos" / f"{number:03d}.jpg", SIZE, number)
        words = [str(at / "model"), str(at / "photos"), "--output_dir"]
        runs: dict[int, list[dict[str, float]]] = {1: [], 2: []}
        for turn in range(args.rounds):
            for count, done in runs.items():
                done.append(predict([*words, str(at / f"out{turn}_{count}")], count))
        for count, done in runs.items():
            figures[f"processes_{count}"] = {key: statistics.median(each[key] for each in done) for key in done[0]}
        for key in ("prediction_seconds", "command_seconds", "cpu_seconds"):
            ratios = [one[key] / two[key] for one, two in zip(runs[1], runs[2], strict=True)]
            figures[f"speed_up_{key.removesuffix('_seconds')}"] = statistics.median(ratios)
        return {**figures, "images": args.images, "size": list(SIZE), "target_speed_up": 1.7}


def huge(at: Path, side: int) -> dict:
    save_image(at / "huge.jpg", (side, side), 0)
    words = [str(at / "model"), str(at / "huge.jpg"), "--test_crop_size", "512", "512", "--output_dir"]
    measured = predict([*words, str(at / "out_huge")], 1)
    return {"size": [side, side], "classes": CLASSES, "window": [512, 512], **measured, "target_peak_mib": 2048}


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of the README."""
    figures = result["figures"]
    rows = [
        (
            "`denseseg predict`, 2 processes, 512x1024, CPU",
            f"{figures['speed_up_prediction']:.2f}x the speed",
            "1 process, same images",
        )
    ]
    if "huge_image" in figures:
        side, peak = figures["huge_image"]["size"][0], figures["huge_image"]["peak_mib"]
        rows.append(
            (f"`denseseg predict`, {side}x{side}, 19 classes, CPU", f"{peak:.0f} MiB peak of the process", "–")
        )
    return rows
