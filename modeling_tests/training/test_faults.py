"""Runs that are broken while they save, load or evaluate: what is kept is whole, and they end as undisturbed ones."""

import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import processes
from hf_denseseg.cli import main
from hf_denseseg.errors import RunError
from hf_denseseg.training import checkpoints
from hf_denseseg.training import trainer as training
from hf_denseseg.training.checkpoints import fault_of, last_complete_checkpoint, mark_complete
from reference import REPOSITORY
from test_published_dsct import REDUCED

WORDS = [
    *("train", "--config_overrides", json.dumps(REDUCED), "--dataset", "synthetic@64x96", "--max_train_samples", "24"),
    *("--max_eval_samples", "2", "--crop_size", "32", "48", "--per_device_train_batch_size", "4", "--max_steps", "6"),
    *("--save_steps", "2", "--use_cpu", "--eval_strategy", "no", "--learning_rate", "1.0e-3"),
]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different[:3]


def resumed_from(folder):
    return json.loads((folder / "results.json").read_text())["training"]["resumed_from_step"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Folder of a finished run of 6 steps, saved at 2, 4 (deleted in the end) and 6."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main([*WORDS, "--save_total_limit", "9", "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def stopped(undisturbed, tmp_path):
    """The same run, stopped after step 4 with two checkpoints."""
    for name in ("checkpoint-2", "checkpoint-4", "recipe.yaml", "batch.json"):
        source, target = undisturbed / name, tmp_path / name
        subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    return tmp_path


def go_on(folder):
    return main([*WORDS, "--save_total_limit", "9", "--output_dir", str(folder)])


def test_a_damaged_checkpoint_falls_back_to_the_one_before(undisturbed, stopped, caplog):
    file = stopped / "checkpoint-4" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert go_on(stopped) == 0
    assert resumed_from(stopped) == 2
    assert "checkpoint-4 cannot be used: optimizer.pt is not what was written" in caplog.text
    assert_same_weights(weights(stopped), weights(undisturbed))


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("optimizer.pt", lambda content: content[:-1], "optimizer.pt has .* bytes"),
        ("optimizer.pt", None, "optimizer.pt is missing"),
        ("complete.json", lambda content: content[: len(content) // 2], "complete.json cannot be read"),
        ("complete.json", lambda content: b'{"config.json": 3}', "complete.json cannot be read"),
        ("complete.json", lambda content: b"[1]", "complete.json cannot be read"),
        ("complete.json", None, "its save was interrupted"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_said(stopped, name, change, fault):
    file = stopped / "checkpoint-4" / name
    content = file.read_bytes()
    file.unlink()
    if change is not None:
        file.write_bytes(change(content))
    assert re.fullmatch(fault + ".*", fault_of(stopped / "checkpoint-4"))
    assert last_complete_checkpoint(stopped) == stopped / "checkpoint-2"


def test_every_byte_of_a_checkpoint_is_watched(tmp_path):
    (tmp_path / "deeper").mkdir()
    rng = np.random.default_rng(0)
    for name in ("weights", "deeper/state"):
        (tmp_path / name).write_bytes(rng.bytes(3000))
    mark_complete(tmp_path)
    assert fault_of(tmp_path) is None
    for name in ("weights", "deeper/state"):
        content = (tmp_path / name).read_bytes()
        for place in (0, 1234, 2999):
            (tmp_path / name).write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
            assert fault_of(tmp_path) == f"{name} is not what was written (another checksum)"
        (tmp_path / name).write_bytes(content)
    assert fault_of(tmp_path) is None


def kill_while_saving():
    """Die as `kill -9` does when the second checkpoint is half written."""
    write, saved = torch.save, []

    def save(value, path, *args, **kwargs):
        saved.append(path)
        if "checkpoint-4" in str(path):
            write(value, path, *args, **kwargs)
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        write(value, path, *args, **kwargs)

    torch.save = save


def test_a_run_killed_while_it_saves_ends_as_an_undisturbed_one(undisturbed, tmp_path):
    run = processes.start([*WORDS, "--output_dir", str(tmp_path)], prepare=kill_while_saving)
    run.join(120)
    assert run.exitcode == -signal.SIGKILL
    assert (tmp_path / "checkpoint-4").exists() and not (tmp_path / "checkpoint-4" / "complete.json").exists()
    assert main([*WORDS, "--output_dir", str(tmp_path)]) == 0
    assert resumed_from(tmp_path) == 2
    assert_same_weights(weights(tmp_path), weights(undisturbed))


def test_a_full_disk_while_saving_leaves_the_checkpoints_before(undisturbed, stopped, capsys):
    """A limit on file sizes refuses the write within a file, as a full disk does."""
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150 * 1024, limits[1]))
    try:
        assert go_on(stopped) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert "checkpoint-6: the disk is full" in said and "checkpoint-4 is whole: the same command goes on" in said
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before
    assert go_on(stopped) == 0
    assert_same_weights(weights(stopped), weights(undisturbed))


@pytest.mark.slow
def test_a_really_full_disk_is_told_and_survived(undisturbed, tmp_path):
    """A file system in memory of 3 MB, where it can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    try:
        report = tmp_path / "said.txt"
        words = [*WORDS, "--save_total_limit", "9", "--output_dir", str(disk)]
        run = processes.start(words, report=str(report))
        run.join(120)
        assert run.exitcode == 1 and "the disk is full" in report.read_text(), report.read_text()[-2000:]
        assert "Traceback" not in report.read_text()
        assert last_complete_checkpoint(disk) is not None
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert main(words) == 0
        assert_same_weights(weights(disk), weights(undisturbed))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def kill_the_worker():
    """Kill the loader worker as soon as the first checkpoint is complete."""
    multiprocessing.set_start_method("fork", force=True)
    mark = checkpoints.mark_complete

    def mark_and_kill(folder):
        mark(folder)
        for child in psutil.Process().children():
            if "resource_tracker" not in " ".join(child.cmdline()):
                child.kill()

    training.mark_complete = mark_and_kill


def test_a_loader_worker_that_dies_ends_the_run_with_one_sentence(undisturbed, tmp_path):
    words = [*WORDS, "--dataloader_num_workers", "1", "--output_dir", str(tmp_path)]
    report = tmp_path / "said.txt"
    run = processes.start(words, report=str(report), prepare=kill_the_worker)
    run.join(120)
    said = report.read_text()
    assert run.exitcode == 1 and "Traceback" not in said and "failed: " in said, said[-2000:]
    # It may follow a progress bar that was cut short in its own line.
    line = said[said.index("failed: ") :].splitlines()[0]
    assert re.match("failed: Stopped after step [234]: A process that loads data died", line), line
    assert re.search("checkpoint-[24] is whole", line), line
    assert main([*WORDS, "--output_dir", str(tmp_path)]) == 0
    assert_same_weights(weights(tmp_path), weights(undisturbed))


def test_a_worker_that_dies_while_it_hands_a_batch_over_is_explained_too(tmp_path, monkeypatch):
    """The connection breaks before the signal comes; a connection that breaks without one is another matter."""
    monkeypatch.setattr(training, "DEATH_IS_KNOWN_AFTER", 0.3)
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=3), output=tmp_path)

    def died(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    before = signal.signal(signal.SIGALRM, died)
    try:
        with (
            pytest.raises(RunError, match="Stopped after step 3: A process that loads data died"),
            training.TaskTrainer._explain_loader_faults(trainer),
        ):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            raise ConnectionResetError(104, "Connection reset by peer")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ConnectionResetError), training.TaskTrainer._explain_loader_faults(trainer):
        raise ConnectionResetError(104, "Connection reset by peer")


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_a_image_that_breaks_during_training_is_named(tmp_path, workers, capsys, monkeypatch):
    """More pairs than are looked at before training; the last one is damaged."""
    from hf_denseseg.training import run as training_run

    monkeypatch.setattr(training_run, "CHECKED_SAMPLES", 1)
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 1)):
        for kind in ("images", "labels"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for index in range(count):
            image = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "data" / split / "images" / f"{index}.png")
            Image.fromarray(image[..., 0] % 3).save(tmp_path / "data" / split / "labels" / f"{index}.png")
    (tmp_path / "data" / "classes.json").write_text(json.dumps({"name": "own", "classes": ["a", "b", "c"]}))
    broken = tmp_path / "data" / "train" / "images" / "7.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:1000])
    words = [*WORDS, "--dataset", str(tmp_path / "data"), "--per_device_train_batch_size", "1", "--save_steps", "1"]
    words += ["--max_steps", "9", "--dataloader_num_workers", workers, "--output_dir", str(tmp_path / "run")]
    code, said = main(words), capsys.readouterr().err
    assert code == 1 and "7.png" in said and "is damaged" in said and "Traceback" not in said
    assert "is whole: the same command goes on from step" in said
    broken.write_bytes(whole)
    assert main(words) == 0


def test_a_killed_final_evaluation_does_not_train_again(undisturbed, stopped, monkeypatch):
    subprocess.run(["cp", "-r", str(undisturbed / "checkpoint-6"), str(stopped / "checkpoint-6")], check=True)
    (stopped / "model").mkdir()
    (stopped / "model" / "model.safetensors").write_bytes(b"half written")
    from hf_denseseg.training.tasks.segmentation import SegmentationTrainer

    monkeypatch.setattr(SegmentationTrainer, "training_step", lambda *args: pytest.fail("trained again"))
    assert go_on(stopped) == 0
    assert_same_weights(weights(stopped), weights(undisturbed))
    scores = [json.loads((folder / "results.json").read_text())["scores"] for folder in (stopped, undisturbed)]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_a_few_interruptions_of_the_soak_are_survived(tmp_path):
    command = [
        sys.executable,
        str(REPOSITORY / "scripts" / "soak.py"),
        "--interruptions",
        "3",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "interruptions-3-seed-0.json").read_text())
    assert result["survived"] == result["interruptions"] == 3
