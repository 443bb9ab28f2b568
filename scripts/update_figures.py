"""Write the measured figures into the README, from the files that the benchmarks and runs left.

python scripts/update_figures.py           # rewrite the block between the marks
python scripts/update_figures.py --check   # exit 1 if the README is not up to date
"""

import argparse
import json
import sys
from pathlib import Path

from hf_denseseg.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "benchmarks" / "results"
CAMVID = "dsct_tiny_sac_camvid_cpu"
START, END = "<!-- figures: python scripts/update_figures.py -->\n", "<!-- end of figures -->\n"


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def row(what: str, figure: str, peer: str, target: str, source: dict) -> str:
    return f"| {what} | {figure} | {peer} | {target} | `{source['command'].removeprefix('python ')}` |"


def speed_rows() -> list[str]:
    """One line per figure of the benchmarks; ratios above 1 mean that the peer needs more."""
    dsct, metrics, argmax = result("dsct"), result("metrics"), result("argmax")
    augmentation, memory = result("augmentation"), result("evaluation_memory")
    rows = []
    for key, what in (("forward", "forward"), ("training_step", "training step")):
        figures, size = dsct["figures"][key], "x".join(map(str, dsct["figures"]["image_size"]))
        rows += [
            row(
                f"`{dsct['figures']['variant']}` {what}, {size}, {dsct['threads']} thread",
                f"{figures['time_ratio']:.2f}x the speed, {figures['memory_ratio']:.2f}x less peak memory",
                "literal formulation",
                "1.25x, less memory" if key == "forward" else "–",
                dsct,
            )
        ]
    ratio = augmentation["figures"]["ratio_to_peer"]
    rows.append(
        row("augmentation, decode included", f"{ratio:.2f}x the CPU time", "OpenCV + numpy", "1.3x", augmentation)
    )
    ratio = metrics["figures"]["int64"]["ours_to_masked_bincount"]
    rows.append(row("confusion matrix, 1024x2048", f"{ratio:.2f}x the time", "numpy `bincount`", "2x", metrics))
    time, space = (argmax["figures"][f"chunked_to_plain_{key}"] for key in ("seconds", "peak_mib"))
    rows.append(
        row(
            "resize + argmax, 150 classes, 1024x2048",
            f"{time:.2f}x the time, {space:.2f}x the memory",
            "`interpolate` + `argmax`",
            "0.1x memory",
            argmax,
        )
    )
    growth = f"{memory['figures']['growth_mib']:.1f} MiB more"
    rows.append(row("evaluating 500 pictures instead of 50", growth, "–", "50 MiB", memory))
    return rows


def camvid_row(name: str, what: str) -> str:
    """One run on CamVid validation, from its `results.json`."""
    run = json.loads((ROOT / "scripts" / "results" / name / "results.json").read_text())
    scores, cost = run["scores"], run["training"]
    # The first run was counted before evaluations were counted apart.
    seconds = cost["cpu_seconds"] + cost.get("evaluation_cpu_seconds", 0.0)
    return (
        f"| {what} | {100 * scores['mean_iou']:.1f} | {100 * scores['pixel_accuracy']:.1f} | "
        f"{run['parameters'] / 1e6:.1f} | {seconds:,.0f} | {cost['wall_seconds'] / 60:.0f} |"
    )


def camvid_rows() -> list[str]:
    """CamVid validation: what our runs left, beside the peers that the data's collection states."""
    return [
        camvid_row(CAMVID, f"`{CAMVID}`"),
        camvid_row(f"{CAMVID}_channels_last", "the same with `--channels_last`"),
        "| U-Net, ResNet-18 (segmentation_models_pytorch) | 27.1 | 71.5 | – | about 1,000 | – |",
        "| SegFormer-B0 (transformers) | 20.4 | 61.9 | – | about 1,000 | – |",
    ]


def block() -> str:
    """The part of the README between the marks."""
    speed = [
        "",
        "Each figure is a ratio against the named peer in one run, written by the command to",
        "`scripts/benchmarks/results/` with the versions and the processor.",
        "",
        "| what | ours | peer | target | command (`python ...`) |",
        "|---|---|---|---|---|",
        *speed_rows(),
        "",
        "Real pictures: CamVid (11 classes, 360x480, validation), from random weights on a CPU, whole pictures,",
        f"single scale: `denseseg train scripts/recipes/{CAMVID}.yaml --dataset path/to/camvid`.",
        "CPU seconds count training, data loading and two evaluations (about 40). The peers' rows come with the",
        "data's collection: about 1,000 CPU seconds of training on the same pictures. One run each, seed 0. Our two",
        "rows are one recipe and seed in two memory formats: single runs of this length scatter by several points.",
        "The recipe was chosen by short trial runs on the same validation pictures, so its row is optimistic.",
        "",
        "| recipe or model | mIoU % | pixel accuracy % | parameters M | CPU seconds | minutes |",
        "|---|---|---|---|---|---|",
        *camvid_rows(),
        "",
        "`dsct_small_sac_camvid` (full size, for a GPU): not measured. Nothing here was measured on a GPU.",
        "",
    ]
    return "\n".join(speed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    updated = before + START + block() + END + after
    if args.check:
        return int(updated != text)
    write_atomic(readme, updated)
    return 0


if __name__ == "__main__":
    sys.exit(main())
