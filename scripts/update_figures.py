"""Write tables and measured figures into the READMEs, from the folders and files that contain them.

python scripts/update_figures.py           # rewrite the blocks between the markers
python scripts/update_figures.py --check   # exit 1 if one is not up to date
"""

import argparse
import functools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import hf_denseseg
from hf_denseseg.files import write_atomic
from hf_denseseg.reports.model_card import paper_of

sys.path.insert(0, str(Path(__file__).resolve().parent))
import benchmark  # noqa: E402 - scripts beside this one
import zoo_tables  # noqa: E402
from experiments import finished  # noqa: E402
from published_tables import LEADERBOARD, published  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "benchmarks" / "results"
CAMVID, CAMVID_PRETRAINED = "dsct_tiny_sac_camvid_cpu", "hfgd_lite0_camvid_cpu"
EXAMPLE = "hfgd_lite0_drawn_streets_cpu"
SECTIONS = {  # of the page of measurements -> its benchmarks
    "Models": ("reference", "cuda_step", "dilated", "setr_encoder", "swin"),
    "Deformable attention": ("msda", "msda_cuda", "msda_roofline", "deformable_detr"),
    "Exports": ("export",),
    "Training": ("training_throughput", "augmentation", "data_path", "derived_recipe"),
    "Evaluation and prediction": ("argmax", "metrics", "evaluator", "evaluation_memory", "predict", "raster"),
    "Faults in labels": ("doubt",),
}


def speed_tables() -> list[str]:
    """A table of each section, one line per figure of its benchmarks, worded by each of them."""
    section_of = {name: section for section, names in SECTIONS.items() for name in names}
    rows: dict[str, list[str]] = {section: [] for section in SECTIONS}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        for what, ours, peer in benchmark.load(result["benchmark"]).readme_rows(result):
            command = result["command"].removeprefix("python ")
            rows[section_of[result["benchmark"]]].append(f"| {what} | {ours} | {peer} | `{command}` |")
    heads = ["| what | ours | peer | command (`python ...`) |", "|---|---|---|---|"]
    return [line for section, lines in rows.items() for line in ("", f"## {section}", "", *heads, *lines)]


def family_rows() -> list[str]:
    """One line per family, from its folder."""
    rows = []
    for family in hf_denseseg.models.auto.registration.families():
        paper = paper_of(family)
        link = f"[{paper['name']}](src/hf_denseseg/models/{family}/README.md)"
        rows.append(f"| {link} | {paper['title']} ({paper['venue']}) | {paper['variants']} |")
    return rows


def families() -> str:
    """The table of papers."""
    return "\n".join(["", "| family | paper | names |", "|---|---|---|", *family_rows(), ""])


def run_of(name: str, file: str = "results.json") -> dict[str, Any]:
    """Results of a recipe."""
    return json.loads((ROOT / "scripts" / "results" / name / file).read_text())


def runs_of(name: str) -> dict[int, dict[str, Any]]:
    """The runs of a recipe by seed."""
    others = sorted((ROOT / "scripts" / "results" / name).glob("results_seed_*.json"))
    return {0: run_of(name), **{int(path.stem.rpartition("_")[2]): run_of(name, path.name) for path in others}}


def camvid_row(what: str, run: dict[str, Any]) -> str:
    """One run on CamVid validation."""
    scores, cost = run["scores"], run["training"]
    seconds = cost["cpu_seconds"] + cost["evaluation_cpu_seconds"]
    return (
        f"| {what} | {100 * scores['mean_iou']:.1f} | {100 * scores['pixel_accuracy']:.1f} | "
        f"{run['parameters'] / 1e6:.1f} | {seconds:,.0f} | {cost['wall_seconds'] / 60:.0f} | "
        f"{run['machine']['processor'] if 'machine' in run else '–'} |"
    )


def camvid_rows() -> list[str]:
    """CamVid validation: our runs, next to the peers whose scores come with the data."""
    return [
        *(
            camvid_row(f"the same, seed {seed}" if seed else f"`{name}`, {start} weights", run)
            for name, start in ((CAMVID, "random"), (CAMVID_PRETRAINED, "ImageNet"))
            for seed, run in runs_of(name).items()
        ),
        camvid_row("the same from random weights, seed 0", run_of(CAMVID_PRETRAINED, "results_random.json")),
        camvid_row(f"`{CAMVID}` with images at their full size", run_of(CAMVID, "results_full_size.json")),
        camvid_row("the same on another processor", run_of(CAMVID, "results_full_size_amd.json")),
        "| U-Net, ResNet-18 (segmentation_models_pytorch) | 27.1 | 71.5 | – | about 1,000 | – | – |",
        "| SegFormer-B0 (transformers) | 20.4 | 61.9 | – | about 1,000 | – | – |",
    ]


def measured() -> str:
    """The tables of measurements."""
    speed = [
        "",
        "Each figure is a ratio to the named peer in one run, written by the command to",
        "`scripts/benchmarks/results/` with the versions and the processor. Rows that name a GPU ran on it, the",
        "others on a CPU.",
        *speed_tables(),
        "",
        "## mIoU on CamVid",
        "",
        "Real images: CamVid (11 classes, 360x480, validation), on a CPU, whole images, single scale:",
        f"`denseseg train scripts/recipes/dsct/{CAMVID}.yaml --dataset path/to/camvid`.",
        "CPU seconds include training, data loading and evaluations (10 to 40). The peers' rows come with the data:",
        "about 1,000 CPU seconds of training on the same images, from random weights. Seed 0 unless said; most runs",
        "had other work beside them. The recipe from random weights was chosen by trial runs on the same",
        "validation images, so its rows are optimistic; that with ImageNet weights ran once per seed, as written",
        "before its first run. *Full size*: the recipe as it was before, with crops of 128x192, scales of 0.5 to 1.25",
        "and 1,400 steps. A dash: the run did not note its processor. The file of a run (`scripts/results/`) names",
        "its commit, or else is of the commit that added it.",
        "",
        "| recipe or model | mIoU % | pixel accuracy % | parameters M | CPU seconds | minutes | processor |",
        "|---|---|---|---|---|---|---|",
        *camvid_rows(),
        "",
        "`dsct_small_sac_camvid` (full size, for a GPU): not measured. All families and their peers at equal CPU",
        "seconds: [Compare models](experiments.md).",
        "",
    ]
    return "\n".join(speed)


def int8_speed() -> str:
    """One sentence from the benchmark `export`."""
    figures = json.loads((RESULTS / "export.json").read_text())["figures"]
    ranges = []
    for kind, name in (("onnx_int8", "ONNX Runtime"), ("openvino_int8", "OpenVINO")):
        runs = figures["1 thread"].values()
        times = sorted(run["eager"]["milliseconds"] / run[kind]["milliseconds"] for run in runs)
        ranges.append(f"{name} {times[0]:.1f} to {times[-1]:.1f} times")
    size = "x".join(map(str, figures["size"]))
    return (
        f"Exported to int8, one variant of each family runs by {' and by '.join(ranges)} as fast as float32 in eager "
        f"mode ({size}, one thread; [figures](docs/measured.md))."
    )


def equal_budgets() -> str:
    """The figure of the leaderboard, and what it shows."""
    results = json.loads(LEADERBOARD.read_text())
    numbers = [len(finished(row)) for row in results["rows"].values()]
    fewest, most = min(numbers), max(numbers)
    seeds = f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
    return (
        f"![Learning curves of {len(results['rows'])} models](scripts/results/leaderboard/camvid.png)\n\n"
        f"*Every family at a small size, and its peers (dashed): {results['budget_cpu_seconds']:g} CPU seconds "
        f"of training each on CamVid ({seeds}; band: lowest to highest). [Table and conditions](docs/experiments.md).*"
    )


def results() -> str:
    """The measured scores in short."""
    random = run_of(CAMVID_PRETRAINED, "results_random.json")
    drawn, cost = run_of(EXAMPLE, "camvid_val.json"), run_of(EXAMPLE)

    def seeds(name: str, start: str, note: str = "") -> str:
        runs = [*runs_of(name).values()]
        scores = [100 * run["scores"]["mean_iou"] for run in runs]
        spread = f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}, {len(scores)} seeds"
        cost = {"cpu_seconds": statistics.mean(run["training"]["cpu_seconds"] for run in runs)}
        return row(f"`{name}`", start, "CamVid", runs[0], spread + note, {"training": cost})

    def row(name: str, start: str, data: str, run: dict, score: str = "", training: dict | None = None) -> str:
        score = score or f"{100 * run['scores']['mean_iou']:.1f}"
        seconds = (training or run)["training"]["cpu_seconds"]
        return f"| {name} | {start} | {data} | {run['parameters'] / 1e6:.1f} | {seconds:,.0f} | – | {score} |"

    lines = [
        "",
        "| recipe | weights at the start | trained on | parameters M | CPU seconds | mIoU % published | measured |",
        "|---|---|---|---|---|---|---|",
        seeds(CAMVID_PRETRAINED, "ImageNet (Lite0)"),
        row("the same", "random", "CamVid", random),
        seeds(CAMVID, "random", ", recipe chosen on these images"),
        row(f"`{EXAMPLE}`", "ImageNet (Lite0)", "drawn streets", drawn, training=cost),
        "",
        equal_budgets(),
        "",
        int8_speed(),
        "",
    ]
    return "\n".join(lines)


def leaderboard(plan: str, alt: str) -> str:
    """Figure and table of a leaderboard; `alt` says what the figure shows."""
    file = LEADERBOARD.with_name(f"{plan}.md")
    image = f"![{alt}](../{file.with_suffix('.png').relative_to(ROOT)})"
    return f'\n{image}\n\n<div class="sortable" markdown="1">\n\n{file.read_text()}\n</div>\n\n'


def guidance(pattern: str) -> str:
    """The tables of HFGD's experiment in the files of a name, such as those of one length of the schedule."""
    files = sorted((ROOT / "scripts" / "results" / "guidance").glob(f"{pattern}.md"))
    return "\n" + "\n".join(path.read_text() for path in files) + "\n"


def export_rows(name: str, cells: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Lines of one model: one for each format, and one for the formats that it lacks for one reason."""
    rows, missing = [], dict[str, list[str]]()
    for kind in sorted(cells):
        cell = cells[kind]
        if "reason" in cell:
            missing.setdefault(cell["reason"], []).append(kind)
            continue
        model, exported = cell["model"], cell["exported"]
        before, after = model["milliseconds"], exported["milliseconds"]
        size = "x".join(map(str, cell["size"])) + ", any" * cell["any_size"]
        rows.append(
            f"| `{name}` | {kind} | {100 * cell['agreement']:.2f} | {100 * model['score']:.2f}, "
            f"{100 * exported['score']:.2f} ({cell['images']}) | {before:.0f}, {after:.0f} | {before / after:.2f}x | "
            f"{size} | {model['peak_mib']:.0f}, {exported['peak_mib']:.0f} | {cell['file_mib']:.1f} |"
        )
    return rows, [f"- `{name}`, {', '.join(kinds)}: {reason}" for reason, kinds in missing.items()]


def exports() -> str:
    """What exported models keep, take and weigh, from the benchmark `export_formats`."""
    result = json.loads((RESULTS / "export_formats.json").read_text())
    lines = [
        "",
        f"On one thread of {result['processor']}; milliseconds in turn with the model in eager mode, and memory, for "
        "one image of the size. `any`: of all sizes, of which this was measured. The score is mIoU, top-1 accuracy "
        "or mAP on the number of images. Agreement: share of the classes, of float32 the lowest of four sizes with "
        "random images, of int8 on the calibration images. The small models learned drawn scenes for 40 steps: "
        "their scores say only whether the export keeps them. Another job ran on the other core, so that the ratio of "
        "the times counts. In eager mode the C++ kernel computes the deformable attention of UN-EPT, in exports plain "
        "operators do. Formats that have no line were not run: "
        "`python scripts/benchmark.py --threads 1 export_formats` goes on with them. How fast published variants run "
        "in each runtime, in float32 and int8: [figures](measured.md).",
        "",
    ]
    heads = ("model", "format", "agreement %", "score %: model, exported (images)", "ms: model, exported", "speed",
             "size", "peak MiB: model, exported", "file MiB")  # fmt: skip
    rows, missing = list[str](), list[str]()
    for name, row in result["figures"]["checkpoints"].items():
        own_rows, own_missing = export_rows(name, row["cells"])
        rows, missing = rows + own_rows, missing + own_missing
    lines += [*zoo_tables.table(heads, rows), "Not written, and why:", "", *missing]
    lines += ["", "The commands of each model stand in `scripts/benchmarks/results/export_formats.json`."]
    file = ROOT / "scripts" / "results" / "exports" / f"{CAMVID_PRETRAINED}_onnx_int8.json"
    record = json.loads(file.read_text())
    classes = record["score"]["classes"]
    each = ", ".join(f"{row['class']} {100 * row['model']:.1f} → {100 * row['exported']:.1f}" for row in classes)
    kept = len(record["int8"]["kept"])
    lines += [
        "",
        f"IoU of each class by `{CAMVID_PRETRAINED}` in float32 and in int8 (ONNX, {record['score']['images']} "
        f"images, {record['int8']['layers']} layers, {kept} of them kept in float32): {each}.",
        "",
    ]
    return "\n".join(lines)


BLOCKS = {
    ROOT / "README.md": {"families": families, "results": results},
    ROOT / "docs" / "measured.md": {"figures": measured},
    ROOT / "docs" / "experiments.md": {
        "leaderboard": functools.partial(
            leaderboard,
            "camvid",
            "mIoU on CamVid's validation images over CPU seconds of training, one curve for each model, peers dashed",
        ),
        "effects": functools.partial(
            leaderboard,
            "camvid_from_scratch",
            "A line for each change: dots for the gain in mIoU over the recipe with each seed, a bar at their mean",
        ),
    },
    ROOT / "docs" / "guidance.md": {
        "guidance": functools.partial(guidance, "camvid_lite0_200_steps"),
        "earlier": functools.partial(guidance, "*-11"),
    },
    ROOT / "docs" / "deploy.md": {"exports": exports},
    ROOT / "docs" / "zoo.md": {"zoo": zoo_tables.zoo},
}
for _family in hf_denseseg.models.auto.registration.families():
    _page = ROOT / "src" / "hf_denseseg" / "models" / _family / "README.md"
    BLOCKS[_page] = {"published": functools.partial(published, _family)}


def updated(page: Path) -> str:
    """A page with every marked block replaced."""
    text = page.read_text()
    for name, write in BLOCKS[page].items():
        start, end = f"<!-- {name}: python scripts/update_figures.py -->\n", f"<!-- end of {name} -->\n"
        before, _, rest = text.partition(start)
        text = before + start + write() + end + rest.partition(end)[2]
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    new = {page: updated(page) for page in BLOCKS}
    if args.check:
        return int(any(text != page.read_text() for page, text in new.items()))
    for page, text in new.items():
        write_atomic(page, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
