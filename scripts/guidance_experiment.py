"""Does guidance help? Train SemanticFPN, + guidance, + axial attention and full HFGM from one pre-trained backbone.

The four arms of the paper's Table 3, with equal budgets and the same three seeds. Guidance protects good features, so
the backbone is trained first, as a plain FCN on synthetic street scenes, and every arm starts from it. Finished runs
are not repeated and an interrupted one resumes, so the script can be started again.

python scripts/guidance_experiment.py --dataset path/to/camvid --output_dir runs/guidance
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from hf_denseseg.files import write_atomic
from hf_denseseg.training import run as training_run
from hf_denseseg.training.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "results" / "guidance"

BACKBONE = {
    "model_type": "resnet",  # ResNet-18 with half its width, small enough for a CPU
    "layer_type": "basic",
    "embedding_size": 32,
    "hidden_sizes": [32, 64, 128, 256],
    "depths": [2, 2, 2, 2],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
MODEL = {
    "backbone_config": BACKBONE,
    "decoder_width": 64,
    "merge_channels": 64,
    "batch_norm_momentum": 0.1,  # the published 0.0003 is for 30,000 steps
    "extra_encoding": "identity",
    "loss_normalization": "valid",
}
FCN = {"upsampler": "none", "guidance": False, "axial_attention": False}
ARMS = {
    "SemanticFPN": {"upsampler": "sfpn", "guidance": False, "axial_attention": False},
    "+ guidance": {"upsampler": "sfpn", "guidance": True, "axial_attention": False},
    "+ axial attention": {"upsampler": "sfpn", "guidance": False, "axial_attention": True},
    "full HFGM": {"upsampler": "sfpn", "guidance": True, "axial_attention": True},
}
PAPER = {"SemanticFPN": 47.14, "+ guidance": 47.67, "+ axial attention": 47.88, "full HFGM": 48.94}  # Table 3

TRAINING = {
    "model": "hfgd-resnet50",
    "crop_size": [192, 256],
    "photometric_distortion": False,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "polynomial",
    "lr_scheduler_kwargs": {"power": 0.9, "lr_end": 0.0},
    "weight_decay": 0.01,
    "save_total_limit": 1,
    "dataloader_num_workers": 1,
    "test_mode": "whole",
}
PRETRAINING = {"dataset": "synthetic:4000", "train_split": "train", "eval_split": "val", "scale_range": [1.0, 1.5]}


def train(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Run a recipe, resume it, or return its results if it is finished."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder.parent / f"{folder.name}.yaml"
    write_atomic(recipe, yaml.safe_dump({**TRAINING, **settings, "output_dir": str(folder)}, sort_keys=False))
    return training_run.train(load_recipe(recipe))


def score(results: dict[str, Any]) -> float:
    """mIoU in percent."""
    return 100 * results["scores"]["mean_iou"]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train the backbone and every arm; return the content of the table."""
    pretraining = PRETRAINING | {
        "config_overrides": MODEL | FCN,
        "max_steps": args.backbone_steps,
        "eval_steps": args.backbone_steps,
        "save_steps": 250,
        "learning_rate": 1.0e-3,
        "warmup_steps": 50,
    }
    backbone = train(args.output_dir / "backbone", pretraining)
    scores: dict[str, list[float]] = {}
    for seed in args.seeds:
        for number, (arm, fields) in enumerate(ARMS.items()):
            settings = {
                "config_overrides": MODEL | fields,
                "encoder_weights": str(args.output_dir / "backbone" / "model"),
                "dataset": args.dataset,
                "train_split": "train",
                "eval_split": "val",
                "scale_range": [0.5, 1.25],
                "max_steps": args.steps,
                "eval_steps": args.steps,
                "save_steps": args.steps,
                "learning_rate": args.learning_rate,
                "warmup_steps": 20,
                "seed": seed,
            }
            result = train(args.output_dir / f"arm{number}_seed{seed}", settings)
            scores.setdefault(arm, []).append(score(result))
            print(f"{arm}, seed {seed}: {scores[arm][-1]:.2f} % mIoU", flush=True)
    return {
        "dataset": result["dataset"],
        "images": result["images"],
        "steps": args.steps,
        "learning_rate": args.learning_rate,
        "seeds": args.seeds,
        "backbone": {
            "dataset": PRETRAINING["dataset"],
            "steps": args.backbone_steps,
            "mean_iou_percent": score(backbone),
        },
        "mean_iou_percent": scores,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def table(results: dict[str, Any]) -> str:
    """Mean and standard deviation of each arm, next to the paper's numbers."""
    base = results["mean_iou_percent"]["SemanticFPN"]
    backbone, seeds = results["backbone"], len(results["seeds"])
    lines = [
        f"{results['dataset']} val ({results['images']} images), {results['steps']} steps of 8, {seeds} seeds; "
        f"the backbone was first trained as a plain FCN for {backbone['steps']} steps on `{backbone['dataset']}` "
        f"({backbone['mean_iou_percent']:.1f} % mIoU there).",
        "",
        "| arm | measured: mIoU %, mean ± standard deviation | each seed | against SemanticFPN, seed by seed | paper "
        "(Table 3, Pascal Context, ResNet-50) |",
        "|---|---|---|---|---|",
    ]
    for arm, scores in results["mean_iou_percent"].items():
        gains = [own - other for own, other in zip(scores, base, strict=True)]
        spread = f" ± {statistics.stdev(scores):.2f}" if seeds > 1 else ""
        lines.append(
            f"| {arm} | {statistics.mean(scores):.2f}{spread} | {', '.join(f'{each:.2f}' for each in scores)} | "
            f"{', '.join(f'{each:+.2f}' for each in gains) if arm != 'SemanticFPN' else '–'} | {PAPER[arm]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="synthetic:200", help="folder of CamVid, or synthetic scenes (default)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/guidance"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for DATASET.json and DATASET.md")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="steps of each arm (default %(default)s)")
    parser.add_argument("--backbone_steps", type=int, default=1000, help="steps of the FCN (default %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()
    results = run(args)
    args.results.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("json", json.dumps(results, indent=1) + "\n"), ("md", table(results))):
        write_atomic(args.results / f"{results['dataset']}.{suffix}", text)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
