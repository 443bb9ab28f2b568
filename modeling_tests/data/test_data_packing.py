"""Packing: images and labels are kept byte for byte, and every loss is reported."""

import errno
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import tarfile
import time

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_denseseg.cli import main
from hf_denseseg.data.classification import load_classification
from hf_denseseg.data.detection import load_detection
from hf_denseseg.data.segmentation import load_segmentation
from hf_denseseg.data.shards import packing
from hf_denseseg.data.shards.packing import pack
from hf_denseseg.errors import InputError, RunError

FORMS = pytest.mark.parametrize("form", ["parquet", "webdataset"])
COUNT = 7
COLORS = {"road": (128, 64, 128), "sky": (70, 130, 180)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep the cache of `datasets` in the folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encoded(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def pairs(tmp_path):
    """JPEG images with color-coded PNG label maps (a specification with a color table)."""
    folder = tmp_path / "pairs"
    for index in range(COUNT):
        draw = np.random.default_rng(index)
        label = np.array(list(COLORS.values()), np.uint8)[draw.integers(2, size=(6, 8))]
        files = {
            f"images/town/p{index}.jpg": encoded(
                Image.fromarray(draw.integers(255, size=(6, 8, 3), dtype=np.uint8)), "JPEG"
            ),
            f"labels/town/p{index}.png": encoded(Image.fromarray(label), "PNG"),
        }
        for name, content in files.items():
            path = folder / "train" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    spec = {"classes": list(COLORS), "colors": COLORS, "raw_to_train": {"7": 0, "11": 1}}
    (folder / "labels.json").write_text(json.dumps(spec))
    return folder


def stored_bytes(shards):
    """Id -> bytes of image and label, read without this package."""
    found = {}
    for path in shards:
        if path.suffix == ".parquet":
            for row in pq.read_table(path).to_pylist():
                found[row["id"]] = row["image"]["bytes"], row["label"]["bytes"]
        else:
            with tarfile.open(path) as archive:
                for member in archive:
                    assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
                    found.setdefault(member.name.partition(".")[0], []).append(archive.extractfile(member).read())
    return {key: tuple(value) for key, value in found.items()}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@FORMS
def test_images_and_labels_are_kept_byte_for_byte(pairs, tmp_path, form):
    source = load_segmentation(pairs, "train")
    shards = pack(source, tmp_path / "out", "train", form=form, rows_per_shard=3)
    assert [path.name.partition(".")[0] for path in shards] == [f"train-{k:05d}-of-00003" for k in range(3)]
    files = [pairs / f"train/{kind}/town/p{{}}.{end}" for kind, end in (("images", "jpg"), ("labels", "png"))]
    expected = {
        f"town/p{index}": tuple(file.parent.joinpath(file.name.format(index)).read_bytes() for file in files)
        for index in range(COUNT)
    }
    assert stored_bytes(shards) == expected
    data = load_segmentation(tmp_path / "out", "train")
    assert data.spec == source.spec
    maps = {row["id"]: row["label"].tolist() for row in source.dataset}
    assert {row["id"]: row["label"].tolist() for row in data.dataset} == maps


@FORMS
def test_the_manifest_records_rows_sizes_and_checksums(pairs, tmp_path, form):
    shards = pack(load_segmentation(pairs, "train"), tmp_path / "out", "train", form=form, rows_per_shard=3)
    manifest = json.loads((tmp_path / "out/train.manifest.json").read_text())
    assert (manifest["rows"], manifest["form"], manifest["split"], manifest["format_version"]) == (7, form, "train", 1)
    assert [shard["rows"] for shard in manifest["shards"]] == [3, 3, 1]
    for path, shard in zip(shards, manifest["shards"], strict=True):
        content = path.read_bytes()
        assert (shard["file"], shard["size"]) == (path.name, len(content))
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()


def test_label_maps_of_other_formats_keep_their_meaning(tmp_path):
    for name, image in (("images/a.png", np.zeros((2, 3, 3), np.uint8)), ("labels/a.bmp", None)):
        path = tmp_path / "pairs/train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.array([[4, 9, 200]] * 2, np.uint8) if image is None else image).save(path)
    (tmp_path / "pairs/labels.json").write_text(
        '{"classes": ["x", "y"], "raw_to_train": {"4": 1, "9": 0}, "raw_void": 200}'
    )
    shards = pack(load_segmentation(tmp_path / "pairs", "train"), tmp_path / "out", "train")
    label = Image.open(io.BytesIO(stored_bytes(shards)["a"][1]))
    assert label.format == "PNG" and np.asarray(label).tolist() == [[4, 9, 200]] * 2
    assert load_segmentation(tmp_path / "out", "train").dataset[0]["label"].tolist() == [[1, 0, 255]] * 2


def test_killed_packing_continues_and_ends_with_the_same_bytes(pairs, tmp_path):
    source = load_segmentation(pairs, "train")

    def pack_slowly():
        write = packing._write_parquet
        packing._write_parquet = lambda *args: (write(*args), time.sleep(0.1))
        pack(source, tmp_path / "killed", "train", rows_per_shard=1)

    process = multiprocessing.get_context("fork").Process(target=pack_slowly)
    process.start()
    while not (tmp_path / "killed/train-00002-of-00007.parquet").exists():
        assert process.is_alive()
        time.sleep(0.005)
    time.sleep(0.05)
    process.kill()  # while the fourth shard is being written
    process.join()
    assert any(name.startswith(".train-00003") for name in contents(tmp_path / "killed"))
    with pytest.raises(InputError, match=r"holds 3 of 7 shards of 'train': packing was not finished. Run `denseseg"):
        load_segmentation(tmp_path / "killed", "train")
    for name in ("killed", "uninterrupted"):
        pack(source, tmp_path / name, "train", rows_per_shard=1)
    assert contents(tmp_path / "killed") == contents(tmp_path / "uninterrupted")


def test_a_full_disk_leaves_complete_shards_only(pairs, tmp_path, monkeypatch):
    source, write, calls = load_segmentation(pairs, "train"), packing._write_parquet, []

    def full(rows, places, content):
        calls.append(1)
        if len(calls) == 2:
            content.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(rows, places, content)

    monkeypatch.setattr(packing, "_write_parquet", full)
    with pytest.raises(RunError, match="the disk is full"):
        pack(source, tmp_path / "out", "train", rows_per_shard=3)
    assert sorted(contents(tmp_path / "out")) == ["labels.json", "train-00000-of-00003.parquet", "train.manifest.json"]
    pack(source, tmp_path / "out", "train", rows_per_shard=3)
    assert len(calls) == 4, "a complete shard must not be written again"
    assert len(load_segmentation(tmp_path / "out", "train").dataset) == COUNT


@FORMS
def test_a_truncated_shard_is_named_with_its_rows_and_fixed_by_the_same_command(tmp_path, capsys, form):
    words = [
        "data",
        "pack",
        "synthetic:5@32x48",
        "--rows_per_shard",
        "2",
        "--format",
        form,
        "--output_dir",
        str(tmp_path),
    ]
    assert main(words) == 0
    before = contents(tmp_path)
    shard = next(tmp_path.glob("train-00001*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        InputError, match=rf"{shard.name} has \d+ bytes instead of \d+; its 2 rows are lost. Run `denseseg"
    ):
        load_segmentation(tmp_path, "train")
    flipped = bytearray(before[shard.name])
    flipped[len(flipped) // 2] ^= 1
    shard.write_bytes(flipped)
    assert main(["data", "check", str(tmp_path)]) == 2
    output = capsys.readouterr().out
    assert f"{shard.name} has changed since it was packed (sha256 differs); its 2 rows may be wrong." in output
    assert main(words) == 0 and contents(tmp_path) == before
    assert main(["data", "check", str(tmp_path)]) == 0


def test_a_changed_source_is_not_mixed_with_older_shards(pairs, tmp_path):
    shards = pack(load_segmentation(pairs, "train"), tmp_path / "out", "train", rows_per_shard=3)
    image = pairs / "train/images/town/p3.jpg"
    image.write_bytes((pairs / "train/images/town/p2.jpg").read_bytes())
    for shard in shards:
        shard.unlink()
    with pytest.raises(InputError, match="the source has changed since"):
        pack(load_segmentation(pairs, "train"), tmp_path / "out", "train", rows_per_shard=3)
    with pytest.raises(InputError, match="holds 7 rows of 'train' that were packed differently"):
        pack(load_segmentation(pairs, "train"), tmp_path / "out", "train", rows_per_shard=2)


def test_splits_joined_with_plus_become_one(pairs, tmp_path):
    shutil.copytree(pairs / "train", pairs / "val")
    for path in sorted((pairs / "val").rglob("p*.*")):
        path.rename(path.with_name("v" + path.name))
    pack(load_segmentation(pairs, "train+val"), tmp_path / "out", "train+val")
    data = load_segmentation(tmp_path / "out", "train_val", streaming=True)
    assert len(list(data.dataset)) == 2 * COUNT


def test_ids_that_webdataset_would_cut_are_refused(pairs, tmp_path):
    for kind, end in (("images", "jpg"), ("labels", "png")):
        (pairs / f"train/{kind}/town/p0.{end}").rename(pairs / f"train/{kind}/town/p.0.{end}")
    with pytest.raises(InputError, match="'town/p.0' contains a dot"):
        pack(load_segmentation(pairs, "train"), tmp_path / "out", "train", form="webdataset")
    assert not (tmp_path / "out/train.manifest.json").exists()


@FORMS
def test_images_with_classes_survive(tmp_path, form):
    source = load_classification("synthetic:6@32x32", "train")
    pack(source, tmp_path, "train", form=form, rows_per_shard=4, task="image-classification")
    data = load_classification(tmp_path, "train")
    assert data.spec.classes == source.spec.classes
    rows = {row["id"]: (row["label"], row["image"].tobytes()) for row in source.dataset}
    assert {row["id"]: (row["label"], row["image"].tobytes()) for row in data.dataset} == rows


@FORMS
def test_images_with_objects_survive(tmp_path, form):
    source = load_detection("synthetic:5@64x96", "train")
    pack(source, tmp_path, "train", form=form, rows_per_shard=2, task="object-detection")
    for empty in (False, True):
        data = load_detection(tmp_path, "train", filter_empty=empty)
        assert data.spec.classes == source.spec.classes
        rows = {row["id"]: row for row in source.dataset}
        found = {row["id"]: row for row in data.dataset}
        assert found.keys() == rows.keys()
        for key, row in found.items():
            assert row["objects"] == rows[key]["objects"] and row["image"].tobytes() == rows[key]["image"].tobytes()
            assert [row[name] for name in ("image_id", "height", "width")] == [
                rows[key][name] for name in ("image_id", "height", "width")
            ]
    assert len(load_detection(tmp_path, "train", limit=3).dataset) == 3
