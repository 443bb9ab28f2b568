"""Does guidance help? HFGD's upsamplers with and without it, from one pre-trained backbone, paired by seed.

The four arms of the paper's Table 3, and the UperNet and FaPN of Table 8, with equal steps and the same seeds. Then
what explains the outcome: full HFGM with one of its two stopped gradients or none (Sec. 5.2); the high-level branch
alone, which is the teacher; and images of twice their size, which the teacher sees as if its stride were 16.
Guidance protects good features, so the backbone is pre-trained: EfficientNet-Lite0 with ImageNet weights if
`--encoder_weights` is given (the file that `convert_efficientnet_lite0.py` writes), else a small ResNet that is first
trained as a plain FCN on synthetic street scenes. Runs that the results hold are not repeated and an interrupted one
resumes, so the script can be started again, with more seeds or arms.

python scripts/guidance_experiment.py --dataset path/to/camvid --encoder_weights lite0.safetensors --steps 700
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from experiments import (
    chart,
    costs,
    finished,
    gain,
    mean_and_spread,
    results_so_far,
    score,
    slug,
    train,
    train_seeds,
)
from hf_denseseg.files import write_atomic

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
LITE0 = {
    "backbone_config": {
        "model_type": "timm_backbone",
        "backbone": "tf_efficientnet_lite0",
        "out_indices": [1, 2, 3, 4],
    },
    "decoder_width": 96,
    "merge_channels": 96,
}
LITE0_PIXELS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
NEITHER = {"guidance": False, "axial_attention": False}
FCN = {"upsampler": "none", **NEITHER}
ARMS: dict[str, dict[str, Any]] = {
    "SemanticFPN": {"upsampler": "sfpn", **NEITHER},
    "+ guidance": {"upsampler": "sfpn", "guidance": True, "axial_attention": False},
    "+ axial attention": {"upsampler": "sfpn", "guidance": False, "axial_attention": True},
    "full HFGM": {"upsampler": "sfpn", "guidance": True, "axial_attention": True},
    "full HFGM, no stops": {"upsampler": "sfpn", "stop_gradient": False},
    "full HFGM, features stopped": {"upsampler": "sfpn", "stop_gradient": "features"},
    "full HFGM, tokens stopped": {"upsampler": "sfpn", "stop_gradient": "tokens"},
    "UperNet": {"upsampler": "upernet", "extra_encoding": "ppm", **NEITHER},
    "UperNet + HFGM": {"upsampler": "upernet", "extra_encoding": "ppm"},
    "FaPN": {"upsampler": "fapn", **NEITHER},
    "FaPN + HFGM": {"upsampler": "fapn"},
    "FCN": FCN,
    "FCN, images doubled": FCN,
    "SemanticFPN, images doubled": {"upsampler": "sfpn", **NEITHER},
    "full HFGM, images doubled": {"upsampler": "sfpn"},
}
DOUBLED = {"crop_size": [384, 512], "scale_range": [1.0, 2.5], "per_device_train_batch_size": 2, "test_scales": [2.0]}
"""What is cropped of an image stays, at the same cost: two crops of four times the pixels for eight."""
BASES = {
    **dict.fromkeys(["+ guidance", "+ axial attention", "FCN"], "SemanticFPN"),
    "full HFGM": "+ axial attention",
    **{arm: "full HFGM" for arm in ARMS if arm.endswith(("stops", "stopped"))},
    **dict.fromkeys(["FCN, images doubled", "full HFGM, images doubled"], "SemanticFPN, images doubled"),
    **{"UperNet + HFGM": "UperNet", "FaPN + HFGM": "FaPN"},
}
"""What each arm is compared with, seed by seed: on the same images, the arm that it changes."""
PAPER = {
    **{"SemanticFPN": 47.14, "+ guidance": 47.67, "+ axial attention": 47.88, "full HFGM": 48.94},  # Table 3
    "full HFGM, no stops": 48.50,  # Sec. 5.2
    "FCN": 45.87,  # Table 1
    **{"UperNet": 48.25, "UperNet + HFGM": 49.96, "FaPN": 47.50, "FaPN + HFGM": 49.87},  # Table 8
}

TRAINING = {
    "model": "hfgd-resnet50",
    "crop_size": [192, 256],
    "photometric_distortion": False,
    "class_balanced_sampling": True,
    "max_grad_norm": 1.0,
    "ema_decay": 0.99,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "polynomial",
    "lr_scheduler_kwargs": {"power": 0.9, "lr_end": 0.0},
    "weight_decay": 0.01,
    "save_total_limit": 1,
    "dataloader_num_workers": 1,
    "test_mode": "whole",
}
PRETRAINING = {"dataset": "synthetic:4000", "train_split": "train", "eval_split": "val", "scale_range": [1.0, 1.5]}


def backbone(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Recipe keys of the arms' backbone and its weights, and what the results say of them."""
    if args.encoder_weights:
        keys = {"config_overrides": MODEL | LITE0, "encoder_weights": args.encoder_weights, **LITE0_PIXELS}
        return keys, {"dataset": "ImageNet-1k (EfficientNet-Lite0)"}
    pretraining = PRETRAINING | {
        "config_overrides": MODEL | FCN,
        "max_steps": args.backbone_steps,
        "eval_steps": args.backbone_steps,
        "save_steps": 250,
        "learning_rate": 1.0e-3,
        "warmup_steps": 50,
    }
    done = score(train(args.output_dir / "backbone", TRAINING | pretraining))
    keys = {"config_overrides": MODEL, "encoder_weights": str(args.output_dir / "backbone" / "model")}
    return keys, {"dataset": PRETRAINING["dataset"], "steps": args.backbone_steps, "mean_iou_percent": done}


def settings_of(arm: str, seed: int, keys: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Recipe of one run."""
    own = {
        "config_overrides": keys["config_overrides"] | ARMS[arm],
        "dataset": args.dataset,
        "train_split": "train",
        "eval_split": "val",
        "scale_range": [0.5, 1.25],
        "max_steps": args.steps,
        "eval_steps": args.steps,
        "save_steps": max(1, args.steps // 5),
        "learning_rate": args.learning_rate,
        "warmup_steps": 20,
        "seed": seed,
    }
    return TRAINING | keys | own | (DOUBLED if arm.endswith("doubled") else {})


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train the backbone if it has no weights, then every arm with the first seed, with the second, and so on."""
    keys, origin = backbone(args)
    head = {"dataset": args.dataset, "steps": args.steps, "learning_rate": args.learning_rate, "backbone": origin}
    file = args.results / f"{stem(head)}.json"
    results = results_so_far(file, head, "guidance_experiment.py", sys.argv[1:])
    rows = results["rows"]
    results["rows"] = {arm: rows.get(arm, {"runs": []}) for arm in ARMS if arm in rows or arm in args.arms}

    def train_arm(arm: str, seed: int) -> dict[str, Any]:
        folder = args.output_dir / f"{slug(arm)}_{args.steps}_steps_seed{seed}"
        done = train(folder, settings_of(arm, seed, keys, args))
        found = [each for each in done["scores"]["per_class"] if each["iou"] is not None]
        classes = {each["class"]: 100 * each["iou"] for each in found}
        known = {"mean_iou_percent": score(done), "classes": classes, "images": done["images"]}
        cost = done["training"]["cpu_seconds"]
        return known | {"cpu_seconds": cost, "commit": done["commit"], "processor": done["processor"]}

    write(results, args.results)
    train_seeds(results["rows"], args.arms, args.seeds, train_arm, lambda: write(results, args.results))
    return results


def stem(results: dict[str, Any]) -> str:
    """Name of the files of the results: dataset, backbone and length of the schedule."""
    backbone = "" if "steps" in results["backbone"] else "_lite0"
    return f"{slug(Path(results['dataset']).name)}{backbone}_{results['steps']}_steps"


def write(results: dict[str, Any], folder: Path) -> None:
    """The results so far."""
    folder.mkdir(parents=True, exist_ok=True)
    name = stem(results)
    write_atomic(folder / f"{name}.json", json.dumps(results, indent=1) + "\n")
    write_atomic(folder / f"{name}.md", table(results) + class_table(results))
    draw(results, folder / f"{name}.png")


def table(results: dict[str, Any]) -> str:
    """Mean and spread of each arm, and its gain over the same upsampler without HFGM, next to the paper's numbers."""
    origin, rows, processor = results["backbone"], results["rows"], results["environment"]["processor"]
    trained = "" if "steps" not in origin else (
        f", as a plain FCN for {origin['steps']} steps ({origin['mean_iou_percent']:.1f} % mIoU there)"
    )  # fmt: skip
    lines = [
        f"{Path(results['dataset']).name} val, {results['steps']} steps of 8, learning rate "
        f"{results['learning_rate']:g}; the backbone was pre-trained on {origin['dataset']}{trained}.",
        "",
        "| arm | measured: mIoU %, mean ± standard deviation | each seed | gain, mean [95 % interval] | over | "
        f"CPU seconds on {processor} | paper (Tables 1, 3, 8, Sec. 5.2; Pascal Context, ResNet-50) |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, row in rows.items():
        paper, base = f"{PAPER[arm]:.2f}" if arm in PAPER else "–", BASES.get(arm, "–")
        if not (scores := [*finished(row).values()]):
            states = [run["state"] for run in row["runs"]]
            lines.append(f"| {arm} | {states[0] if states else 'not measured'} | – | – | – | – | {paper} |")
            continue
        timed = [run["cpu_seconds"] for run in costs(row, processor)]
        seconds = f"{statistics.mean(timed):.0f}" if timed else "–"
        each = ", ".join(f"{score:.2f}" for score in scores)
        lines.append(
            f"| {arm} | {mean_and_spread(scores)} | {each} | {gain(row, rows.get(base))} | "
            f"{base} | {seconds} | {paper} |"
        )
    return "\n".join(lines) + "\n"


def class_table(results: dict[str, Any]) -> str:
    """IoU of each class, mean over the seeds; empty where no run has them."""
    rows = {arm: [run["classes"] for run in row["runs"] if "classes" in run] for arm, row in results["rows"].items()}
    names = list(dict.fromkeys(name for runs in rows.values() for run in runs for name in run))
    if not names:
        return ""
    lines = ["", "IoU of each class in %, mean over the seeds:", "", f"| arm | {' | '.join(names)} |"]
    lines.append("|---" * (1 + len(names)) + "|")
    for arm, runs in rows.items():
        each = ([run[name] for run in runs if name in run] for name in names)
        if runs:
            cells = [f"{statistics.mean(scores):.1f}" if scores else "–" for scores in each]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """A line per arm: a dot for each seed, a bar at their mean; orange: with guidance."""
    rows = {arm: [*finished(row).values()] for arm, row in results["rows"].items() if finished(row)}
    with chart(path, (8, 1.2 + 0.3 * len(rows))) as axis:
        for line, (arm, scores) in enumerate(rows.items()):
            color = "C1" if "guidance" in arm or "HFGM" in arm else "C0"
            axis.plot(scores, [line] * len(scores), "o", color=color)
            axis.plot([statistics.mean(scores)], [line], "|", color=color, markersize=16, markeredgewidth=2)
        axis.set(yticks=range(len(rows)), yticklabels=list(rows), xlabel="validation mIoU in %")
        axis.invert_yaxis()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="synthetic:200", help="folder of CamVid, or synthetic scenes (default)")
    parser.add_argument("--encoder_weights", help="ImageNet weights of EfficientNet-Lite0 (default: a small ResNet)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="these arms only")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/guidance"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for DATASET.json, .md and .png")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="steps of each arm (default %(default)s)")
    parser.add_argument("--backbone_steps", type=int, default=1000, help="steps of the FCN (default %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()
    results = run(args)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
