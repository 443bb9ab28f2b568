"""Interrupt tiny training runs in all the ways known from practice, restart them, and compare their final weights.

python scripts/soak.py --interruptions 50 --seed 0

At a random moment, while it loads, trains, saves or evaluates, a run is killed or terminated, its disk gets full (a
random limit on file sizes), or its loader worker is killed; or the newest checkpoint of a stopped run is truncated or
changed. Then the same command is run again. When a run has finished the next one starts, until N interruptions have
taken place. An interruption is survived if its run ends with the weights of an uninterrupted one, bit for bit, and if
it reported in one line what had happened. The counts are written to scripts/results/soak/.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import torch
import transformers

from hf_denseseg.cli import main as denseseg
from hf_denseseg.training.checkpoints import checkpoints_of

SIZES = {"spatial_hidden_sizes": [8, 16, 32], "stem_channels": 8, "hidden_size": 32}
SIZES |= {"num_hidden_layers": 6, "num_attention_heads": 2, "decoder_hidden_size": 16}
RUN = [
    *("train", "--config_overrides", json.dumps(SIZES), "--dataset", "synthetic@64x96", "--max_train_samples", "24"),
    *("--max_eval_samples", "4", "--crop_size", "32", "48", "--per_device_train_batch_size", "4", "--max_steps", "60"),
    *("--save_steps", "3", "--ema_decay", "0.9", "--dataloader_num_workers", "1", "--eval_steps", "30", "--use_cpu"),
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["hf_denseseg.training.run"])
MESSAGES = {"full disk": "the disk is full", "worker killed": "A process that loads data died"}
WHILE_RUNNING = ("kill -9", "SIGTERM", "full disk", "worker killed")
BETWEEN = ("checkpoint cut", "checkpoint changed")


def run_denseseg(words: list[str], report: str, largest_file: int | None) -> None:
    """Run in a separate process; its output goes to `report`, and no file may grow beyond `largest_file` bytes."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    multiprocessing.set_start_method("fork", force=True)  # the default start method of loader workers
    with open(report, "w") as output:
        sys.stdout = sys.stderr = output
        os.dup2(output.fileno(), 2)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        torch.set_num_threads(1)
        code = denseseg(words)
        output.flush()
    os._exit(code)


class Soak:
    """A series of interrupted runs: its folder, its random numbers and its counts.

    Args:
        folder: for the runs.
        seed: of kinds, moments and places of the interruptions.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.draw = random.Random(seed)
        self.tried: Counter[str] = Counter()
        self.survived: Counter[str] = Counter()
        self.faults: list[str] = []
        self.runs = 0
        started = time.monotonic()
        assert self.start("uninterrupted").wait() == 0, self.printed()
        self.seconds = time.monotonic() - started
        self.expected = (folder / "uninterrupted" / "model" / "model.safetensors").read_bytes()
        self.largest = max(path.stat().st_size for path in (folder / "uninterrupted").rglob("*.safetensors"))

    def start(self, name: str, largest_file: int | None = None) -> "Soak":
        """Start, or continue, the run `name`."""
        words = [*RUN, "--output_dir", str(self.folder / name)]
        self.process: BaseProcess = CONTEXT.Process(
            target=run_denseseg, args=(words, str(self.folder / "printed.txt"), largest_file)
        )
        self.process.start()
        return self

    def wait(self) -> int | None:
        """Exit code of the run; if negative, the signal that ended it."""
        self.process.join()
        return self.process.exitcode

    def printed(self) -> str:
        """Output of the run."""
        return (self.folder / "printed.txt").read_text()

    def interrupt(self, name: str, kind: str) -> bool:
        """Start the run and interrupt it at a random moment; False if it finished before."""
        if kind == "full disk":
            code = self.start(name, self.draw.randrange(self.largest // 10, self.largest)).wait()
        else:
            self.start(name)
            time.sleep(self.draw.uniform(0.1, 0.5) * self.seconds)
            with contextlib.suppress(psutil.NoSuchProcess):  # it has finished by itself
                victim = psutil.Process(self.process.pid)
                if kind == "worker killed":
                    children = [each for each in victim.children() if "tracker" not in " ".join(each.cmdline())]
                    victim = self.draw.choice(children) if children else None
                if victim is not None:
                    victim.send_signal(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
            code = self.wait()
        if code == 0:
            return False
        text = self.printed()
        if code == 1 and ("Traceback" in text or MESSAGES[kind] not in text):
            self.faults.append(f"{kind}: {text[-2000:]}")
        return True

    def damage(self, name: str, kind: str) -> bool:
        """Truncate or change one file of the newest checkpoint; False if there is none."""
        folders = checkpoints_of(self.folder / name)
        files = [path for path in folders[-1].iterdir() if path.stat().st_size] if folders else []
        if not files:
            return False
        path = self.draw.choice(sorted(files))
        content = bytearray(path.read_bytes())
        position = self.draw.randrange(len(content))
        if kind == "checkpoint cut":
            del content[position:]
        else:
            content[position] ^= self.draw.randrange(1, 256)
        path.write_bytes(content)
        return True

    def one_run(self, wanted: int) -> None:
        """Train one run to its end with at most `wanted` interruptions, and check its weights."""
        self.runs += 1
        name, met, before = f"run{self.runs}", Counter[str](), len(self.faults)
        while met.total() < wanted:
            kind = self.draw.choice(WHILE_RUNNING + BETWEEN)
            met[kind] += self.damage(name, kind) if kind in BETWEEN else self.interrupt(name, kind)
            if (self.folder / name / "results.json").exists():
                break
            if met.total() >= 12:  # otherwise a run of these few steps might never end
                break
        code = self.start(name).wait()
        self.tried += met
        if code != 0:
            self.faults.append(f"{name} did not finish: {self.printed()[-2000:]}")
        elif (self.folder / name / "model" / "model.safetensors").read_bytes() != self.expected:
            self.faults.append(f"{name} ended with other weights, after {dict(met)}")
        elif len(self.faults) == before:
            self.survived += met
        shutil.rmtree(self.folder / name)


def main() -> int:
    """Interrupt runs until the count is reached; print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interruptions", type=int, default=50, help="number of interruptions")
    parser.add_argument("--seed", type=int, default=0, help="seed of kinds and moments")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results" / "soak")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak, shown = Soak(Path(folder), args.seed), 0
        while soak.tried.total() < args.interruptions:
            soak.one_run(args.interruptions - soak.tried.total())
            print(*soak.faults[shown:], sep="\n", end="")
            shown = len(soak.faults)
            print(f"{soak.survived.total()} of {soak.tried.total()} survived in {soak.runs} runs", flush=True)
    result = {
        "interruptions": soak.tried.total(),
        "survived": soak.survived.total(),
        "kinds": {kind: [soak.survived[kind], soak.tried[kind]] for kind in sorted(soak.tried)},
        "runs": soak.runs,
        "steps_of_a_run": 60,
        "seed": args.seed,
        "seconds": round(time.monotonic() - started),
        "faults": soak.faults,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "python": platform.python_version(),
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / f"interruptions-{args.interruptions}-seed-{args.seed}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"survived {result['survived']} of {result['interruptions']} interruptions; written: {path}")
    return int(result["survived"] != result["interruptions"])


if __name__ == "__main__":
    sys.exit(main())
