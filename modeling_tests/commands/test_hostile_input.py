"""Files made to break what reads them: one line and an exit code come out, never a traceback, code or gigabytes."""

import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import hf_denseseg
from hf_denseseg.cli import main
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.reading.images import read_image, read_label
from hf_denseseg.errors import InputError, RunError
from hf_denseseg.models.auto.pretrained import load_image_processor, load_trained_model, task_of_checkpoint
from hf_denseseg.training.recipe import load_recipe, recipe_fields
from test_published_dsct import REDUCED

FEW = settings(
    max_examples=int(os.environ.get("HOSTILE_EXAMPLES", "15")),
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SPEC = LabelSpec(name="two", classes=("a", "b"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@contextmanager
def memory_limit(extra):
    """Refuse this process more than `extra` bytes beyond what it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def refused_or_read(read, *args):
    """Call it; only the two errors that a command prints as one line may come out."""
    with memory_limit(1 << 30):
        try:
            return read(*args)
        except (InputError, RunError) as error:
            assert str(error).strip()
            return error


def encoded(mode, size, kind):
    data = io.BytesIO()
    Image.new(mode, size).save(data, kind)
    return data.getvalue()


IMAGES = [
    encoded(mode, (9, 7), kind)
    for mode, kind in [("RGB", "PNG"), ("L", "JPEG"), ("P", "GIF"), ("I;16", "PNG"), ("RGBA", "WEBP"), ("F", "TIFF")]
] + [encoded("CMYK", (9, 7), "JPEG"), encoded("RGB", (9, 7), "BMP"), encoded("1", (9, 7), "PNG")]


@FEW
@given(st.sampled_from(IMAGES), st.integers(0, 2**32), st.integers(0, 6), st.booleans())
def test_damaged_images_and_masks_are_read_or_refused(content, seed, changes, cut):
    draw, content = random.Random(seed), bytearray(content)
    for _ in range(changes):
        content[draw.randrange(len(content))] = draw.randrange(256)
    content = bytes(content[: draw.randrange(len(content))] if cut else content)
    image = refused_or_read(read_image, content, "image.png")
    assert isinstance(image, InputError) or image.mode == "RGB"
    label = refused_or_read(read_label, content, SPEC, "mask.png")
    assert isinstance(label, InputError) or (label.ndim == 2 and label.dtype == np.uint8)


@FEW
@given(st.binary(max_size=200))
def test_bytes_that_are_no_image_are_refused(content):
    assert isinstance(refused_or_read(read_image, content, "image.png"), InputError)


def png_that_claims(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 2**31 - 1), (0, 5)])
def test_an_image_that_claims_to_be_huge_is_refused_unread(size):
    error = refused_or_read(read_image, png_that_claims(*size), "huge.png")
    assert isinstance(error, InputError) and "huge.png" in str(error)


RECIPES = {
    "a tag that makes objects": "!!python/object/apply:os.system ['touch PWNED']",
    "a tag in a value": "model: !!python/object/apply:os.system ['touch PWNED']",
    "aliases of aliases": "a: &a [x, x]\nb: &b [*a, *a]\n" + "c: &c [*b, *b]\n" * 30,
    "a wrong value far too long": f"crop_size: {'x' * 100_000}",
    "deep nesting in brackets": "model: " + "[" * 100_000,
    "deep nesting in dashes": "model:\n " + "- " * 3_000,
    "a number of ten thousand digits": "max_steps: " + "9" * 10_000,
    "a date that is none": "model: 2001-99-99",
    "bytes that are no text": "model: \x00",
    "a key that is a list": "? [a, b]\n: 1",
    "a file of two megabytes": "# \n" * 700_000,
    "not a number": "learning_rate: .nan",
    "sides that are words": "crop_size: [a, b]",
    "a scale without an end": "scale_range: [0.5, .inf]",
}


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES)
def test_a_hostile_recipe_is_one_line_and_code_2(tmp_path, capsys, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    with memory_limit(1 << 30):
        assert main(["train", "recipe.yaml", "--print_config"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 2000
    assert not (tmp_path / "PWNED").exists()


@FEW
@given(st.dictionaries(st.sampled_from(sorted(recipe_fields())) | st.text(max_size=9), JSON, max_size=3))
def test_arbitrary_recipes_are_taken_or_refused(tmp_path, values):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    refused_or_read(load_recipe, path)


@FEW
@given(JSON, st.sampled_from(["classes", "palette", "ids", "lut", "name", "ignore", "everything"]))
def test_arbitrary_label_specifications_are_taken_or_refused(tmp_path, value, key):
    content = value if key == "everything" else {"name": "own", "classes": ["a", "b"], key: value}
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(content))
    refused_or_read(LabelSpec.from_file, path)


class Hostile:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A complete checkpoint: configuration, header and data of its weights."""
    folder = tmp_path_factory.mktemp("saved")
    hf_denseseg.create_model("dsct-tiny-sac", num_labels=3, **REDUCED).save_pretrained(folder)
    content = (folder / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads((folder / "config.json").read_text()), json.loads(content[8:end]), content[end:]


def write_checkpoint(folder, config, weights):
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    (folder / "model.safetensors").write_bytes(weights)
    return str(folder)


def safetensors(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_pickles_are_refused_and_their_code_is_not_run(tmp_path, saved, capsys):
    trap = tmp_path / "PWNED"
    for name, write in (("plain", pickle.dump), ("torch", torch.save)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(saved[0]))
        with (folder / "pytorch_model.bin").open("wb") as file:
            write({"weight": Hostile(trap)}, file)
        assert (
            main(
                [
                    "evaluate",
                    str(folder),
                    "--dataset",
                    "synthetic@32x32",
                    "--use_cpu",
                    "--output_dir",
                    str(tmp_path / "out"),
                ]
            )
            == 2
        )
        assert "a pickle, which may run code" in capsys.readouterr().err
        words = ["train", "--encoder_weights", str(folder / "pytorch_model.bin"), "--use_cpu", "--max_steps", "1"]
        words += ["--dataset", "synthetic@32x32", "--max_train_samples", "1", "--max_eval_samples", "1"]
        assert main([*words, "--output_dir", str(tmp_path / f"run_{name}")]) == 2
    assert not trap.exists()


def test_code_that_a_checkpoint_brings_is_not_run(tmp_path, saved):
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoImageProcessor": "own.C"}}
    checkpoint = write_checkpoint(tmp_path, config, safetensors(saved[1], saved[2]))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')\nclass C: pass\n")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | {"image_processor_type": "C"}))
    assert isinstance(refused_or_read(load_trained_model, checkpoint), InputError)
    assert isinstance(refused_or_read(load_image_processor, checkpoint), InputError)
    assert not (tmp_path / "PWNED").exists()


def change_header(change):
    def made(header, data):
        header = json.loads(json.dumps(header))
        first, second = [name for name in header if name != "__metadata__"][:2]
        change(header, first, second)
        return safetensors(header, data)

    return made


WEIGHTS = {
    "nothing": lambda header, data: b"",
    "header beyond the file": lambda header, data: struct.pack("<Q", 2**40) + b"{}",
    "header that is no JSON": lambda header, data: safetensors(b"\xff\xfe{", data),
    "cut short": lambda header, data: safetensors(header, data[: len(data) // 2]),
    "overlapping": change_header(lambda h, a, b: h[b].update(data_offsets=h[a]["data_offsets"])),
    "beyond the end": change_header(lambda h, a, b: h[a].update(data_offsets=[0, 2**50])),
    "wrong type": change_header(lambda h, a, b: h[a].update(dtype="F16")),
    "unknown type": change_header(lambda h, a, b: h[a].update(dtype="X9")),
    "huge shape": change_header(lambda h, a, b: h[a].update(shape=[2**40, 2**40])),
    "a pickle": lambda header, data: pickle.dumps({"weight": 1}),
}


@pytest.mark.parametrize("change", WEIGHTS.values(), ids=WEIGHTS)
def test_malformed_safetensors_are_refused(tmp_path, saved, change):
    config, header, data = saved
    error = refused_or_read(load_trained_model, write_checkpoint(tmp_path, config, change(header, data)))
    assert isinstance(error, InputError)


CONFIGURATIONS = {
    "hidden_size": [10**9, 2**70, 65_536, -4, "x", None],
    "num_hidden_layers": [3 * 10**9, 0],
    "decoder_hidden_size": [10**7],
    "num_labels": [10**9],
    "id2label": [{"a": "b"}, {str(k): "x" for k in range(5)}],
    "model_type": ["none", 5],
    "dtype": ["none"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in CONFIGURATIONS.items() for value in values]
)
def test_configurations_of_other_or_huge_models_are_refused(tmp_path, saved, key, value):
    config, header, data = saved
    checkpoint = write_checkpoint(tmp_path, config | {key: value}, safetensors(header, data))
    refused_or_read(task_of_checkpoint, checkpoint)
    assert isinstance(refused_or_read(load_trained_model, checkpoint), InputError)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "3", "[" * 100_000, '{"model_type": "dsct", "a": ' + "9" * 9000 + "}"]
)
def test_configurations_that_are_none_are_refused(tmp_path, saved, text):
    checkpoint = write_checkpoint(tmp_path, text, safetensors(saved[1], saved[2]))
    assert isinstance(refused_or_read(load_trained_model, checkpoint), InputError)


@FEW
@given(st.dictionaries(st.sampled_from(sorted(REDUCED) + ["id2label", "architectures"]), JSON, min_size=1, max_size=2))
def test_arbitrary_fields_of_a_configuration_are_taken_or_refused(tmp_path, saved, fields):
    config, header, data = saved
    refused_or_read(load_trained_model, write_checkpoint(tmp_path, config | fields, safetensors(header, data)))


@pytest.mark.slow
def test_states_of_a_run_are_read_without_running_code(tmp_path):
    """Whoever can write into a run folder still cannot run code by it: transformers reads them with `weights_only`."""
    words = ["train", "--config_overrides", json.dumps(REDUCED), "--dataset", "synthetic@64x96", "--use_cpu"]
    words += ["--max_train_samples", "8", "--max_eval_samples", "1", "--crop_size", "32", "48", "--max_steps", "2"]
    words += ["--per_device_train_batch_size", "4", "--save_steps", "1", "--eval_strategy", "no"]
    words += ["--output_dir", str(tmp_path / "run")]
    assert main(words) == 0
    from hf_denseseg.training.checkpoints import mark_complete

    trap = tmp_path / "PWNED"
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (tmp_path / "run" / "results.json").unlink(missing_ok=True)
        shutil.rmtree(tmp_path / "run" / "checkpoint-2", ignore_errors=True)
        file = tmp_path / "run" / "checkpoint-1" / name
        content = file.read_bytes()
        torch.save({"state": Hostile(trap)}, file)
        mark_complete(file.parent)
        code = main(words)
        assert not trap.exists()
        assert code == (0 if name == "training_args.bin" else 2), name  # the first is never read
        file.write_bytes(content)
        mark_complete(file.parent)


@pytest.mark.parametrize("name", ["../outside.png", "images/training/bomb.jpg"])
def test_a_hostile_archive_is_refused_by_the_command(tmp_path, capsys, name):
    """Names that leave the folder, and 64 MB of zeros in 64 KB; nothing is unpacked."""
    path = tmp_path / "evil.zip"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(name, "w", force_zip64=True) as file,
    ):
        for _ in range(16):
            file.write(bytes(1 << 22))
    with memory_limit(3 << 30):
        assert main(["data", "check", str(path), "--split", "train"]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path.parent / "outside.png").exists()
