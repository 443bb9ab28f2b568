"""Every family and its peers on one road: equal CPU seconds, each with the best of one small search, several seeds.

    python scripts/leaderboard.py --dataset camvid --data path/to/camvid --budget_cpu_seconds 1000 --seeds 3

The rows stand in `scripts/leaderboards/DATASET.yaml`, or another plan of that folder (`--plan camvid_from_scratch`:
one recipe, and what each change to it is worth). First a few steps of every row are timed, which gives the number of
steps that fit into the budget. Then each row is searched on a part of the training split, one key after the other, and
trained once per seed; the validation split decides nothing. Steps, not seconds, are what runs share, so that other
load on the machine changes no score. What the results hold is not run again: start the script again to go on, with
`--rows` for some rows only. A run that fails stays in the results. Writes `scripts/results/leaderboard/PLAN.json`,
`.md` and `.png` (learning curves, or gains over the base) after every run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import yaml

from experiments import (
    DENSESEG,
    chart,
    costs,
    differences,
    finished,
    mean_and_spread,
    results_so_far,
    score,
    slug,
    train,
    train_seeds,
)
from hf_denseseg.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "results" / "leaderboard"
SMP = (sys.executable, str(ROOT / "scripts" / "smp_unet.py"))
TIMED_STEPS = (4, 44)  # of two short runs; their difference leaves out what every run does once
EVALUATIONS = 5  # points of a learning curve
HELD_BACK = 0.2  # part of the training split that the search is scored on
SEARCH_SHARE = 1 / 8  # part of the budget that a run of the search has


class Row:
    """One model of the table: its recipe, and the folder of its runs."""

    def __init__(self, name: str, plan: dict[str, Any], args: argparse.Namespace) -> None:
        own = dict(plan["rows"][name])
        self.name, self.folder, self.args = name, args.output_dir / slug(name), args
        self.images: dict[str, dict[str, Any]] = plan.get("images", {})  # what each choice of `images` stands for
        own.pop("peer", None)  # where the model comes from: for readers, and for its line in the figure
        self.pretrained: bool = own.pop("pretrained", False)
        self.pretraining: dict[str, Any] | None = own.pop("pretraining", None)
        self.same_cost: bool = own.pop("same_cost", False)  # a step costs what one of the base costs
        self.warmup: float = own.pop("fraction_of_warmup", 0.05)
        self.recipe = {**plan["shared"], **own, "dataset": args.data}
        self.command = SMP if self.recipe["model"] == "smp-unet" else DENSESEG
        if self.pretrained:
            self.recipe["encoder_weights"] = args.encoder_weights

    def train(self, name: str, **settings: Any) -> dict[str, Any]:
        """One run of the row; the U-Net starts from a folder with the random weights of its seed."""
        recipe = self.recipe | self.expanded(settings)
        if self.command is SMP:
            seed = str(settings.get("seed", 0))
            start = self.folder / f"start_{seed}"
            if not start.exists():
                subprocess.run([*SMP, "create", str(start), seed], check=True)
            recipe["model"] = str(start)
        return train(self.folder / name, recipe, self.command)

    def expanded(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Keys of the recipe; `images` is a name of several."""
        keys = dict(settings)
        return self.images.get(keys.pop("images", ""), {}) | keys

    def seconds_per_step(self) -> float:
        """CPU seconds of a training step, data included."""
        taken = [
            self.train(f"timed_{steps}", max_steps=steps, eval_strategy="no", max_eval_samples=1, save_steps=steps)
            for steps in TIMED_STEPS
        ]
        first, second = (run["training"]["cpu_seconds"] for run in taken)
        return (second - first) / (TIMED_STEPS[1] - TIMED_STEPS[0])

    def schedule(self, steps: int) -> dict[str, Any]:
        """Keys of a run of this number of steps."""
        return {
            "max_steps": steps,
            "warmup_steps": max(1, int(self.warmup * steps)),
            "save_steps": max(1, steps // 10),
        }

    def search(self, steps: int, choices: dict[str, list[Any]]) -> list[dict[str, Any]]:
        """Runs of `steps` for one key after the other, with the best of those before it; scored on a part of train."""
        tried: list[dict[str, Any]] = []
        settings = {key: values[0] for key, values in choices.items()}
        for key, values in choices.items():
            for value in values:
                trial = settings | {key: value}
                if trial not in [each["settings"] for each in tried]:
                    tried.append({"settings": trial, **self.attempt(steps, trial)})
            settings = best(tried)
        return tried

    def attempt(self, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
        """mIoU on the part of the training split that is held back; 0 if the run failed."""
        name = slug("_".join(["search", *map(str, settings.values())]))
        try:
            run = self.train(name, **self.schedule(steps), eval_strategy="no", eval_fraction=HELD_BACK, **settings)
        except RuntimeError as error:
            return {"mean_iou_percent": 0.0, "state": f"failed: {error}"}
        return {"mean_iou_percent": score(run), "images": run["images"]}

    def final(self, seed: int, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
        """Train on the whole training split; what the table needs of the run."""
        before, part = 0.0, 0  # CPU seconds and steps of the pre-training
        if self.pretraining:
            keys = dict(self.pretraining)
            part = int(keys.pop("fraction_of_steps") * steps)
            keys |= {**self.schedule(part), "eval_strategy": "no", "max_eval_samples": 1, "seed": seed}
            before = self.train(f"pretraining_{seed}", **settings | keys)["training"]["cpu_seconds"]
            steps -= part
            start = {"model": str(self.folder / f"pretraining_{seed}" / "model"), "config_overrides": None}
            settings = settings | start
        keys = self.schedule(steps) | {"eval_steps": steps // EVALUATIONS, "seed": seed}
        run = self.train(f"seed_{seed}", **keys, **settings)
        cost, history = run["training"], run["history"]
        evaluated = [[part + each["step"], 100 * each["eval_mean_iou"]] for each in history if "eval_mean_iou" in each]
        # A run that was continued has measured what came after its checkpoint only.
        first = cost["resumed_from_step"]
        per_step = cost["cpu_seconds"] / (steps - first)
        judged = sum(step > part + first for step, _ in evaluated)
        return {
            "mean_iou_percent": score(run),
            "cpu_seconds": before + per_step * steps,
            "curve": evaluated,
            "train_images_per_second": self.recipe["per_device_train_batch_size"] / per_step,
            "eval_images_per_second": judged * run["images"] / cost["evaluation_cpu_seconds"],
            "peak_memory_bytes": cost["peak_memory_bytes"],
            "parameters": run["parameters"],
            "commit": run["commit"],
            "processor": run["processor"],
            "classes": {each["class"]: 100 * each["iou"] for each in run["scores"]["per_class"]},
        }


def multiply_adds(row: Row, plan: dict[str, Any], settings: dict[str, Any]) -> int:
    """Of one image at the size of the test, counted on the model of the first timed run."""
    size = (row.recipe | row.expanded(settings)).get("test_base_size", plan["image_size"])
    script = (
        "import sys, torch, hf_denseseg, smp_unet; from transformers import AutoModelForSemanticSegmentation as Auto\n"
        "from hf_denseseg.models.flops import count_forward\n"
        "counts = count_forward(Auto.from_pretrained(sys.argv[1]).to('meta'), (int(sys.argv[2]), int(sys.argv[3])))\n"
        "print(counts.layer_multiply_adds + counts.product_multiply_adds)"
    )
    model = row.folder / f"timed_{TIMED_STEPS[0]}" / "model"
    words = [sys.executable, "-c", script, str(model), *map(str, size)]
    done = subprocess.run(words, check=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    return int(done.stdout.split()[-1])


def best(tried: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings that did best in a search; none if there was none."""
    return max(tried, key=lambda each: each["mean_iou_percent"], default={"settings": {}})["settings"]


HEADS = ("model", "mIoU %, mean ± standard deviation", "seeds", "steps", "parameters M", "GMACs",
         "images per CPU second: training / evaluation", "peak memory MiB", "CPU seconds")  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The rows, best first."""
    rows, base = results["rows"], results.get("base")
    keys = list(dict.fromkeys(key for row in rows.values() for key in best(row["search"])))
    names = " and ".join(key.replace("_", " ") for key in keys)
    how = f"; {names} by a search on a fifth of the training split at an eighth of the budget" if keys else ""
    heads = [*HEADS, *([names] if keys else []), *([f"gain over {base}, seed by seed"] if base else [])]
    lines = [
        f"{results['dataset']} val, {results['budget_cpu_seconds']:g} CPU seconds of training for each run on "
        f"{results['environment']['processor']}{how}.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for name, row in sorted(rows.items(), key=lambda each: -statistics.mean(finished(each[1]).values() or [-1.0])):
        if finished(row):
            cells = cells_of(row, results["environment"]["processor"])
            cells += [", ".join(map(str, best(row["search"]).values()))] if keys else []
            gains = differences(row, rows.get(base))
            cells += [mean_and_spread(gains, "+.2f") if gains else "–"] if base else []
        else:
            cells = [row["runs"][0]["state"] if row["runs"] else "not measured", *["–"] * (len(heads) - 2)]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines) + "\n"


def cells_of(row: dict[str, Any], processor: str) -> list[str]:
    """The cells below `HEADS` behind the name: means over the seeds, speed and seconds of those on the processor."""
    runs = [run for run in row["runs"] if run["state"] == "done"]
    timed = costs(row, processor)

    def mean(key: str, form: str) -> str:
        return format(statistics.mean(run[key] for run in timed), form) if timed else "–"

    memory = statistics.mean(run["peak_memory_bytes"] for run in runs)
    return [
        mean_and_spread([*finished(row).values()]),
        str(len(runs)),
        str(row["steps"]),
        f"{runs[0]['parameters'] / 1e6:.2f}",
        f"{row['multiply_adds'] / 1e9:.2f}",
        f"{mean('train_images_per_second', '.1f')} / {mean('eval_images_per_second', '.1f')}",
        f"{memory / 2**20:.0f}",
        mean("cpu_seconds", ".0f"),
    ]


def draw(results: dict[str, Any], path: Path) -> None:
    """Learning curves over CPU seconds: the mean of the seeds, and the band from lowest to highest; peers dashed."""
    rows = {name: row for name, row in results["rows"].items() if finished(row)}
    with chart(path, (9, 5)) as axis:
        for name, row in sorted(rows.items(), key=lambda each: -statistics.mean(finished(each[1]).values())):
            runs = [run for run in row["runs"] if run["state"] == "done"]
            seconds = [step * row["seconds_per_step"] for step, _ in runs[0]["curve"]]
            scores = [[run["curve"][number][1] for run in runs] for number in range(len(seconds))]
            label = textwrap.fill(f"{name}: {statistics.mean(finished(row).values()):.1f}", 30)
            style = {"linestyle": "--" if row["recipe"].get("peer") else "-", "marker": "o", "markersize": 4}
            (line,) = axis.plot(seconds, [statistics.mean(each) for each in scores], label=label, **style)
            band = {"color": line.get_color(), "alpha": 0.2, "lw": 0}
            axis.fill_between(seconds, list(map(min, scores)), list(map(max, scores)), **band)
        axis.set(xlabel="CPU seconds of training", ylabel="validation mIoU in %", xlim=(0, None), ylim=(0, None))
        if rows:
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def draw_gains(results: dict[str, Any], path: Path) -> None:
    """A line per row: a dot for the gain over the base with each seed, a bar at their mean; best row on top."""
    rows = results["rows"]
    gains = {name: differences(row, rows.get(results["base"])) for name, row in rows.items()}
    shown = sorted((name for name in gains if gains[name]), key=lambda name: -statistics.mean(gains[name]))
    with chart(path, (8, 1.2 + 0.3 * len(shown))) as axis:
        for line, name in enumerate(shown):
            axis.plot(gains[name], [line] * len(gains[name]), "o", color="C0", markersize=5)
            axis.plot([statistics.mean(gains[name])], [line], "|", color="C0", markersize=16, markeredgewidth=2)
        axis.axvline(0.0, color="black", lw=1)
        axis.set(yticks=range(len(shown)), yticklabels=shown)
        axis.set_xlabel(f"gain over {results['base']} with the same seed, points of validation mIoU")
        axis.invert_yaxis()


def write(results: dict[str, Any], folder: Path) -> None:
    """The results so far."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = results["plan"]
    write_atomic(folder / f"{stem}.json", json.dumps(results, indent=1) + "\n")
    write_atomic(folder / f"{stem}.md", table(results))
    (draw_gains if results.get("base") else draw)(results, folder / f"{stem}.png")


def plan_of(args: argparse.Namespace) -> dict[str, Any]:
    """The rows of a dataset, those that were asked for; ends the script if they cannot be run."""
    plan = yaml.safe_load((ROOT / "scripts" / "leaderboards" / f"{args.plan}.yaml").read_text())
    if unknown := set(args.rows or ()) - set(plan["rows"]):
        sys.exit(f"--rows: {', '.join(sorted(unknown))} is no row. The rows are: {'; '.join(plan['rows'])}.")
    plan["rows"] = {name: each for name, each in plan["rows"].items() if not args.rows or name in args.rows}
    if not args.encoder_weights and any(each.get("pretrained") for each in plan["rows"].values()):
        sys.exit("--encoder_weights: give the file that scripts/convert_efficientnet_lite0.py writes, or leave the "
                 "row with ImageNet weights out by --rows.")  # fmt: skip
    return plan


def start_row(row: Row, plan: dict[str, Any], states: dict[str, Any], budget: float) -> dict[str, Any]:
    """What is known of a row before it is trained: seconds of a step, steps that fit into the budget, operations."""
    own = {"recipe": plan["rows"][row.name], "search": [], "runs": []}
    if row.same_cost:
        if plan["base"] not in states:
            sys.exit(f"--rows: {row.name} gets the steps of {plan['base']!r}: name that row too.")
        return states[plan["base"]] | own
    seconds = row.seconds_per_step()
    print(f"{row.name}: {seconds:.3f} CPU seconds per step", flush=True)
    steps = max(1, int(budget / seconds) // EVALUATIONS) * EVALUATIONS
    return own | {"seconds_per_step": seconds, "steps": steps, "multiply_adds": multiply_adds(row, plan, {})}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time all rows, search all, then train all with the first seed, all with the second, and so on."""
    plan = plan_of(args)
    head = {"plan": args.plan, "dataset": args.dataset, "budget_cpu_seconds": args.budget_cpu_seconds}
    words = f"--dataset {args.dataset} --plan {args.plan} --budget_cpu_seconds {args.budget_cpu_seconds:g}".split()
    words += ["--seeds", str(args.seeds)]
    file = args.results / f"{args.plan}.json"
    head |= {"base": plan.get("base"), "shared": plan["shared"]}
    head |= {key: plan[key] for key in ("search", "images") if key in plan}
    results = results_so_far(file, head, "leaderboard.py", words)
    rows = {name: Row(name, plan, args) for name in plan["rows"]}
    states = results["rows"]
    for name, row in rows.items():
        if name in states and states[name]["recipe"] != plan["rows"][name]:
            sys.exit(f"{file} holds runs of {name!r} with another recipe: take the row out of the file, or give "
                     "the new one another name.")  # fmt: skip
        if name not in states:
            states[name] = start_row(row, plan, states, args.budget_cpu_seconds)
            write(results, args.results)
    for name, row in rows.items():
        if "search" in plan and not states[name]["search"]:
            state = states[name]
            state["search"] = row.search(max(1, int(SEARCH_SHARE * state["steps"])), plan["search"])
            state["multiply_adds"] = multiply_adds(row, plan, best(state["search"]))
            write(results, args.results)
    write(results, args.results)
    train_seeds(
        states,
        rows,
        range(args.seeds),
        lambda name, seed: rows[name].final(seed, states[name]["steps"], best(states[name]["search"])),
        lambda: write(results, args.results),
    )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="camvid", help="name of the dataset in the table (default camvid)")
    parser.add_argument("--plan", help="name of a file in scripts/leaderboards (default: that of the dataset)")
    parser.add_argument("--data", required=True, help="`dataset` key of the recipes: folder of the dataset")
    parser.add_argument("--budget_cpu_seconds", type=float, default=1000.0, help="of training (default 1000)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default 3)")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these rows only")
    parser.add_argument("--encoder_weights", help="ImageNet weights of EfficientNet-Lite0, see docs/experiments.md")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/leaderboard"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for PLAN.json, .md and .png")
    args = parser.parse_args()
    args.plan = args.plan or args.dataset
    print(table(run(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
