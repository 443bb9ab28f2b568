"""Fraction of training time spent waiting for data: 2 loader workers and a tiny model.

The trainer measures it (`data_wait_fraction` in results.json). Sources: the synthetic scenes, and pairs like CamVid's
(360x480, JPEG and PNG) as a folder of files, as packed shards that are indexed, and as shards that are streamed. Every
source is also read without a model: CPU time per image of a worker, and of the training process, which receives it.
CPU times hardly depend on other load; fractions and rates do.
"""

import argparse
import resource
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from hf_denseseg.data.segmentation import load_segmentation
from hf_denseseg.data.shards.packing import pack
from hf_denseseg.data.synthetic.scenes import SYNTHETIC_SPEC, render_scene
from hf_denseseg.files import write_atomic
from hf_denseseg.training import run as training_run
from hf_denseseg.training.recipe import load_recipe

SIZE = (360, 480)
TINY = "{spatial_hidden_sizes: [16, 24, 32], stem_channels: 16, hidden_size: 24, num_hidden_layers: 6, \
num_attention_heads: 2, decoder_hidden_size: 16}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=64, help="pairs in the folder (default 64)")
    parser.add_argument("--steps", type=int, default=25, help="steps of each run (default 25)")
    parser.add_argument("--batch_size", type=int, default=4, help="images per step (default 4)")
    parser.add_argument("--workers", type=int, default=2, help="loader workers (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each source, in turn (default 3)")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Median over the rounds of each source's figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        sources = write_sources(folder, args.images)
        found: dict[str, dict[str, list[float]]] = {source: {} for source in sources}
        for number in range(args.rounds):
            for source, (data, streaming) in sources.items():
                trainer = build(data, streaming, args, folder / f"{source} {number}")
                figures = {**read(trainer, args), **train(trainer, args)}
                for key, value in figures.items():
                    found[source].setdefault(key, []).append(value)
    return {
        "images": {"size": list(SIZE), "batch": args.batch_size, "workers": args.workers, "steps": args.steps},
        **{source: {key: statistics.median(values) for key, values in found[source].items()} for source in sources},
    }


def write_sources(folder: Path, count: int) -> dict[str, tuple[str, bool]]:
    """Name -> dataset, and whether it is streamed."""
    for index in range(count):
        image, label = render_scene("train", index, SIZE)
        for kind, content, suffix in (("images", image, "jpg"), ("labels", Image.fromarray(label), "png")):
            path = folder / "pairs/train" / kind / f"{index:04d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            content.save(path)
    write_atomic(folder / "pairs/labels.json", '{"classes": ["' + '", "'.join(SYNTHETIC_SPEC.classes) + '"]}')
    for form in ("parquet", "webdataset"):
        data = load_segmentation(folder / "pairs", "train")
        pack(data, folder / form, "train", form=form, rows_per_shard=max(1, count // 8))
    return {
        "synthetic scenes": ("synthetic", False),
        "folder": (str(folder / "pairs"), False),
        "parquet, indexed": (str(folder / "parquet"), False),
        "parquet, streamed": (str(folder / "parquet"), True),
        "webdataset, streamed": (str(folder / "webdataset"), True),
    }


def build(data: str, streaming: bool, args: argparse.Namespace, output: Path) -> Any:
    """A trainer as `denseseg train` builds it."""
    height, width = map(str, SIZE)
    words = [
        *("--model", "dsct-tiny-sac", "--config_overrides", TINY, "--dataset", data, "--crop_size", height, width),
        *("--eval_split", "validation" if data == "synthetic" else "train", "--max_eval_samples", "1"),
        *("--streaming", str(streaming).lower(), "--dataloader_num_workers", str(args.workers), "--use_cpu"),
        *("--per_device_train_batch_size", str(args.batch_size), "--max_steps", str(args.steps)),
        *("--eval_strategy", "no", "--save_strategy", "no", "--output_dir", str(output), "--disable_tqdm", "true"),
    ]
    recipe = load_recipe(None, words)
    train_data, eval_data = training_run.load_data(recipe, "train"), training_run.load_data(recipe, "eval")
    model = training_run.build_model(recipe.model, eval_data.spec)
    return training_run.build_trainer(recipe, model, eval_data, train_data)


def train(trainer: Any, args: argparse.Namespace) -> dict[str, float]:
    """Fraction of the time spent waiting for data, and CPU time of the model."""
    before = time.process_time()
    trainer.train()
    return {
        "data_wait_fraction": trainer.data_time.fraction,
        "training_process_cpu_ms_per_image": (time.process_time() - before) * 1000 / args.steps / args.batch_size,
        "step_ms": trainer.data_time.total * 1000 / (args.steps - 1),
    }


def read(trainer: Any, args: argparse.Namespace) -> dict[str, float]:
    """Batches without a model: images per second, CPU milliseconds per image in the workers and in this process."""
    batches = iter(islice(trainer.get_train_dataloader(), args.steps))
    count = len(next(batches)["labels"])  # now the workers are running
    children, own, started = _children_seconds(), time.process_time(), time.perf_counter()
    images = sum(len(batch["labels"]) for batch in batches)
    wall, own = time.perf_counter() - started, time.process_time() - own
    del batches  # stops the workers; only then their CPU time is counted
    worker = (_children_seconds() - children) / (images + count)
    return {
        "images_per_second_without_model": images / wall,
        "worker_cpu_ms_per_image": worker * 1000,
        "images_per_second_with_one_core_per_worker": args.workers / worker,
        "receiving_cpu_ms_per_image": own * 1000 / images,
    }


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of the README."""
    figures = dict(result["figures"])
    shape = figures.pop("images")
    percent = [100 * each["data_wait_fraction"] for each in figures.values()]
    what = f"time a tiny model waits for {shape['workers']} loader workers, {len(percent)} sources"
    return [(what, f"{min(percent):.1f} to {max(percent):.1f} % of training", "–")]


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
