"""Runs that fail while they save, load or evaluate: checkpoints stay complete, and resumed runs end as others do."""

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
def uninterrupted(tmp_path_factory):
    """Folder of a finished run of 6 steps, saved at 2, 4 (deleted in the end) and 6."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert main([*WORDS, "--save_total_limit", "9", "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def stopped(uninterrupted, tmp_path):
    """The same run, stopped after step 4 with two checkpoints."""
    for name in ("checkpoint-2", "checkpoint-4", "recipe.yaml", "batch.json"):
        source, target = uninterrupted / name, tmp_path / name
        subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    return tmp_path


def resume(folder):
    return main([*WORDS, "--save_total_limit", "9", "--output_dir", str(folder)])


def test_a_damaged_checkpoint_falls_back_to_the_one_before(uninterrupted, stopped, caplog):
    file = stopped / "checkpoint-4" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert resume(stopped) == 0
    assert resumed_from(stopped) == 2
    assert "checkpoint-4 cannot be used: optimizer.pt has changed since it was written" in caplog.text
    assert_same_weights(weights(stopped), weights(uninterrupted))


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
def test_faults_of_a_checkpoint_are_named(stopped, name, change, fault):
    file = stopped / "checkpoint-4" / name
    content = file.read_bytes()
    file.unlink()
    if change is not None:
        file.write_bytes(change(content))
    assert re.fullmatch(fault + ".*", fault_of(stopped / "checkpoint-4"))
    assert last_complete_checkpoint(stopped) == stopped / "checkpoint-2"


def test_every_byte_of_a_checkpoint_is_checked(tmp_path):
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
            assert fault_of(tmp_path) == f"{name} has changed since it was written (wrong checksum)"
        (tmp_path / name).write_bytes(content)
    assert fault_of(tmp_path) is None


def kill_while_saving():
    """Kill the process, as `kill -9` does, when half of the second checkpoint is written."""
    write, saved = torch.save, []

    def save(value, path, *args, **kwargs):
        saved.append(path)
        if "checkpoint-4" in str(path):
            write(value, path, *args, **kwargs)
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        write(value, path, *args, **kwargs)

    torch.save = save


def test_a_run_killed_while_it_saves_ends_as_an_uninterrupted_one(uninterrupted, tmp_path):
    run = processes.start([*WORDS, "--output_dir", str(tmp_path)], prepare=kill_while_saving)
    run.join(120)
    assert run.exitcode == -signal.SIGKILL
    assert (tmp_path / "checkpoint-4").exists() and not (tmp_path / "checkpoint-4" / "complete.json").exists()
    assert main([*WORDS, "--output_dir", str(tmp_path)]) == 0
    assert resumed_from(tmp_path) == 2
    assert_same_weights(weights(tmp_path), weights(uninterrupted))


def test_a_full_disk_while_saving_leaves_the_checkpoints_before(uninterrupted, stopped, capsys):
    """A limit on file sizes makes a write fail in the middle of a file, as a full disk does."""
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150 * 1024, limits[1]))
    try:
        assert resume(stopped) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    stderr = capsys.readouterr().err
    assert (
        "checkpoint-6: the disk is full" in stderr and "checkpoint-4 is complete: the same command continues" in stderr
    )
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before
    assert resume(stopped) == 0
    assert_same_weights(weights(stopped), weights(uninterrupted))


@pytest.mark.slow
def test_a_full_file_system_is_reported_and_survived(uninterrupted, tmp_path):
    """A file system in memory of 3 MB, where it can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    try:
        report = tmp_path / "stderr.txt"
        words = [*WORDS, "--save_total_limit", "9", "--output_dir", str(disk)]
        run = processes.start(words, report=str(report))
        run.join(120)
        assert run.exitcode == 1 and "the disk is full" in report.read_text(), report.read_text()[-2000:]
        assert "Traceback" not in report.read_text()
        assert last_complete_checkpoint(disk) is not None
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert main(words) == 0
        assert_same_weights(weights(disk), weights(uninterrupted))
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


def test_a_loader_worker_that_dies_ends_the_run_with_one_sentence(uninterrupted, tmp_path):
    words = [*WORDS, "--dataloader_num_workers", "1", "--output_dir", str(tmp_path)]
    report = tmp_path / "stderr.txt"
    run = processes.start(words, report=str(report), prepare=kill_the_worker)
    run.join(120)
    stderr = report.read_text()
    assert run.exitcode == 1 and "Traceback" not in stderr and "failed: " in stderr, stderr[-2000:]
    # It may follow an unfinished progress bar on the same line.
    line = stderr[stderr.index("failed: ") :].splitlines()[0]
    assert re.match("failed: Stopped after step [234]: A process that loads data died", line), line
    assert re.search("checkpoint-[24] is complete", line), line
    assert main([*WORDS, "--output_dir", str(tmp_path)]) == 0
    assert_same_weights(weights(tmp_path), weights(uninterrupted))


def test_a_worker_that_dies_while_it_sends_a_batch_is_explained_too(tmp_path, monkeypatch):
    """The connection breaks before the signal arrives; without a signal its error is raised as it is."""
    monkeypatch.setattr(training, "WORKER_DEATH_DELAY", 0.3)
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
def test_a_damaged_image_found_during_training_is_named(tmp_path, workers, capsys, monkeypatch):
    """More pairs than are checked before training; the last one is damaged."""
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
    intact = broken.read_bytes()
    broken.write_bytes(intact[:1000])
    words = [*WORDS, "--dataset", str(tmp_path / "data"), "--per_device_train_batch_size", "1", "--save_steps", "1"]
    words += ["--max_steps", "9", "--dataloader_num_workers", workers, "--output_dir", str(tmp_path / "run")]
    code, stderr = main(words), capsys.readouterr().err
    assert code == 1 and "7.png" in stderr and "is damaged" in stderr and "Traceback" not in stderr
    assert "is complete: the same command continues from step" in stderr
    broken.write_bytes(intact)
    assert main(words) == 0


def test_a_killed_final_evaluation_does_not_train_again(uninterrupted, stopped, monkeypatch):
    subprocess.run(["cp", "-r", str(uninterrupted / "checkpoint-6"), str(stopped / "checkpoint-6")], check=True)
    (stopped / "model").mkdir()
    (stopped / "model" / "model.safetensors").write_bytes(b"partly written")
    from hf_denseseg.training.tasks.segmentation import SegmentationTrainer

    monkeypatch.setattr(SegmentationTrainer, "training_step", lambda *args: pytest.fail("trained again"))
    assert resume(stopped) == 0
    assert_same_weights(weights(stopped), weights(uninterrupted))
    scores = [json.loads((folder / "results.json").read_text())["scores"] for folder in (stopped, uninterrupted)]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_a_few_interruptions_of_the_soak_are_survived(tmp_path):
    command = [
        sys.executable,
        str(REPOSITORY / "scripts" / "soak.py"),
        "--interruptions",
        "3",
        "--output_dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "interruptions-3-seed-0.json").read_text())
    assert result["survived"] == result["interruptions"] == 3
