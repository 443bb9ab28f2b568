"""Loading image-label pairs from folders, shards and hub datasets, and the errors for unusable ones."""

import io
import os
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.reading.images import read_image, read_label
from hf_denseseg.data.segmentation import Rows, load_segmentation
from hf_denseseg.data.shards import tables
from hf_denseseg.data.shards.packing import pack
from hf_denseseg.errors import InputError, RunError
from reference import REPOSITORY

SPEC = LabelSpec.from_dict(
    {"name": "t", "classes": ["a", "b", "c"], "raw_void": [9], "colors": {"a": [0, 0, 0], "b": [255, 0, 0]}}
)
CAMVID = Path(os.environ.get("DENSESEG_CAMVID", REPOSITORY.parent / "shared/data/camvid"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def label_map(seed=0, shape=(12, 16)):
    return np.random.default_rng(seed).choice(np.array([0, 1, 2, 9], dtype=np.uint8), shape)


def write_pairs(folder, split="train", count=3, layout="{split}/{kind}", labels="labels"):
    for index in range(count):
        for kind, suffix in (("images", "jpg"), (labels, "png")):
            path = folder / layout.format(split=split, kind=kind) / f"city/p{index}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = (
                Image.new("RGB", (16, 12), (index, 90, 200)) if suffix == "jpg" else Image.fromarray(label_map(index))
            )
            image.save(path)
    (folder / "classes.json").write_text('{"name": "t", "classes": ["a", "b", "c"], "raw_void_id": 9}')
    return folder


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def check_rows(rows, count=3):
    rows = list(rows)
    assert len(rows) == count
    for index, row in enumerate(rows):
        assert row["image"].mode == "RGB" and row["image"].size == (16, 12)
        assert row["label"].dtype == np.uint8
        assert (row["label"] == np.where(label_map(index) == 9, 255, label_map(index))).all()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("layout", "labels"),
    [
        ("{split}/{kind}", "labels"),
        ("{kind}/{split}", "masks"),
        ("{kind}/{split}", "annotations"),
        ("{split}/{kind}", "masks"),
    ],
)
def test_folders_of_pairs_in_both_layouts(tmp_path, layout, labels, streaming):
    data = load_segmentation(write_pairs(tmp_path, layout=layout, labels=labels), "train", streaming=streaming)
    check_rows(data.dataset)
    assert [row["id"] for row in data.dataset] == ["city/p0", "city/p1", "city/p2"]
    assert data.spec.classes == ("a", "b", "c")


def test_val_and_validation_are_the_same_split(tmp_path):
    write_pairs(tmp_path, split="val")
    check_rows(load_segmentation(tmp_path, "validation").dataset)
    check_rows(load_segmentation(tmp_path, "val", limit=2).dataset, 2)


def test_a_folder_loads_without_the_datasets_library(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    data = load_segmentation(write_pairs(tmp_path), "train")
    assert isinstance(data.dataset, Rows) and len(data.dataset) == 3
    check_rows(data.dataset[k] for k in range(3))
    with pytest.raises(IndexError):
        data.dataset[3]


@pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid is not at $DENSESEG_CAMVID or ../shared/data/camvid")
@pytest.mark.parametrize(("split", "count"), [("train", 367), ("val", 101)])
def test_camvid_loads_without_conversion(split, count):
    data = load_segmentation(CAMVID, split)
    assert len(data.dataset) == count and data.spec.num_labels == 11
    ids = set()
    for index in range(0, count, 9):
        row = data.dataset[index]
        assert row["image"].size == (480, 360) and row["label"].shape == (360, 480)
        ids |= set(np.unique(row["label"]).tolist())
    assert ids == {*range(11), 255}


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_shards_hold_the_pairs_byte_for_byte(tmp_path, streaming):
    source = load_segmentation(write_pairs(tmp_path / "pairs"), "train")
    paths = pack(source, tmp_path / "shards", "train", rows_per_shard=2)
    assert [path.name for path in paths] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    for file in (tmp_path / "pairs/train").rglob("*.*"):
        file.unlink()  # the shards must not refer to the files
    data = load_segmentation(tmp_path / "shards", "train", streaming=streaming)
    rows = sorted(data.dataset, key=lambda row: row["id"])
    check_rows(rows)
    assert data.spec == source.spec and [row["id"] for row in rows] == ["city/p0", "city/p1", "city/p2"]


def test_embedded_scenes_survive_parquet(tmp_path):
    source = load_segmentation("synthetic:2@40x48", "train")
    pack(source, tmp_path, "train")
    packed = sorted(load_segmentation(tmp_path, "train").dataset, key=lambda row: row["id"])
    for ours, theirs in zip(packed, source.dataset, strict=True):
        assert ours["image"].tobytes() == theirs["image"].tobytes() and (ours["label"] == theirs["label"]).all()


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_shards(tmp_path, streaming):
    with tarfile.open(tmp_path / "train-0000.tar", "w") as archive:
        for index in range(3):
            for suffix, content in (("jpg", png(np.zeros((12, 16, 3), np.uint8))), ("png", png(label_map(index)))):
                member = tarfile.TarInfo(f"p{index}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    (tmp_path / "labels.yaml").write_text("{classes: [a, b, c], raw_void: [9]}")
    data = load_segmentation(tmp_path, "train", streaming=streaming)
    check_rows(data.dataset)
    assert [row["id"] for row in data.dataset] == ["p0", "p1", "p2"]


def hub_table(folder, ids=(0, 1, 2, 9), image="photo", label="semantic_mask", count=3):
    rows = {
        image: [{"bytes": png(np.zeros((12, 16, 3), np.uint8)), "path": None}] * count,
        label: [
            {"bytes": png(np.random.default_rng(k).choice(np.array(ids, np.uint8), (12, 16))), "path": None}
            for k in range(count)
        ],
    }
    features = datasets.Features({image: datasets.Image(), label: datasets.Image()})
    (folder / "data").mkdir(parents=True)
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_in_hub_layout_with_a_column_map(tmp_path, streaming):
    folder = hub_table(tmp_path / "hub")
    data = load_segmentation(folder, "val", spec=SPEC, columns={"image": "photo"}, streaming=streaming)
    rows = list(data.dataset)
    assert [row["id"] for row in rows] == ["00000000", "00000001", "00000002"]
    assert set(np.unique(np.stack([row["label"] for row in rows]))) == {0, 1, 2, 255}


def test_a_hub_id_is_loaded_at_its_revision(tmp_path, monkeypatch):
    folder, asked = hub_table(tmp_path / "hub", image="image", label="annotation"), []

    def redirect(function):
        def call(name, *args, revision=None, **options):
            asked.append((name, revision))
            return function(str(folder), *args, **options)

        return call

    for name in ("load_dataset", "get_dataset_split_names"):
        monkeypatch.setattr(datasets, name, redirect(getattr(datasets, name)))
    data = load_segmentation("owner/streets", "validation", spec=SPEC, revision="abc")
    assert len(data.dataset) == 3 and set(asked) == {("owner/streets", "abc")}


def test_label_ids_are_checked_against_the_specification_not_guessed(tmp_path):
    folder = hub_table(tmp_path / "hub", ids=(0, 1, 2, 3))
    with pytest.raises(InputError, match=r"hub does not fit its label specification.*Raw ids 3 .*raw_to_train"):
        load_segmentation(folder, "val", spec=SPEC, columns={"image": "photo"})
    with pytest.raises(InputError, match="All labels .* are ignored"):
        load_segmentation(hub_table(tmp_path / "void", ids=(9,)), "val", spec=SPEC, columns={"image": "photo"})


def test_missing_columns_are_listed(tmp_path):
    folder = hub_table(tmp_path / "hub")
    with pytest.raises(InputError, match=r"no image column.*its columns are photo, semantic_mask.*columns="):
        load_segmentation(folder, "val", spec=SPEC)
    with pytest.raises(InputError, match=r"\['photograph'\]; it takes image, label and id"):
        load_segmentation(folder, "val", spec=SPEC, columns={"photograph": "photo"})


def test_a_hub_id_without_network_gives_a_one_sentence_error():
    with pytest.raises(RunError, match="'owner/streets' is not a local folder, and the hub cannot be reached"):
        load_segmentation("owner/streets", "train", spec=SPEC)
    with pytest.raises(InputError, match="needs a label specification"):
        load_segmentation("owner/streets", "train")


def test_script_datasets_point_to_the_converted_copy(monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found streets.py")

    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    with pytest.raises(InputError, match="refs/convert/parquet"):
        tables.open_table("owner/streets", "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "train/labels/city/p1.png").unlink(), r"p1.jpg has no label map .*train/labels"),
        (lambda root: (root / "train/images/city/p1.jpg").unlink(), r"p1.png has no image .*train/images"),
        (lambda root: [path.unlink() for path in root.glob("train/*/city/*")], "Split 'train' is empty"),
        (lambda root: (root / "classes.json").unlink(), "No label specification in"),
        (lambda root: (root / "train").rename(root / "trian"), "no split 'train'; available: trian. Did you mean"),
        (lambda root: (root / "train/labels").rename(root / "train/truth"), "holds no dataset"),
    ],
)
def test_incomplete_folders_are_rejected(tmp_path, change, message):
    write_pairs(tmp_path)
    change(tmp_path)
    with pytest.raises(InputError, match=message):
        load_segmentation(tmp_path, "train")


def test_missing_folders_and_a_file_instead_of_a_folder_are_rejected(tmp_path):
    with pytest.raises(InputError, match="no such folder, and it is not a hub id"):
        load_segmentation(tmp_path / "nowhere", "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file. Give the folder"):
        load_segmentation(tmp_path / "file", "train")


def damage(root, name, content):
    (root / "train" / name).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: damage(root, "images/city/p1.jpg", b""), r"p1.jpg is empty \(0 bytes\)"),
        (lambda root: damage(root, "images/city/p1.jpg", b"text"), r"p1.jpg is not a readable image"),
        (
            lambda root: damage(root, "images/city/p1.jpg", (root / "train/images/city/p1.jpg").read_bytes()[:-90]),
            r"p1.jpg is damaged .*[Tt]runcated",
        ),
        (lambda root: damage(root, "labels/city/p1.png", png(np.zeros((12, 15), np.uint8))), "12x16, label 12x15"),
        (lambda root: damage(root, "labels/city/p1.png", png(np.full((12, 16), 7, np.uint8))), "p1.png: Raw ids 7"),
        (
            lambda root: damage(root, "labels/city/p1.png", png(np.full((12, 16, 3), (9, 0, 0), np.uint8))),
            "p1.png: .*`colors`",
        ),
    ],
)
def test_a_damaged_pair_is_named_with_the_fix(tmp_path, change, message):
    write_pairs(tmp_path)
    change(tmp_path)
    data = load_segmentation(tmp_path, "train")
    check_rows([data.dataset[0]], 1)
    with pytest.raises(InputError, match=message):
        data.dataset[1]


def test_an_image_bomb_is_rejected_by_name(tmp_path, monkeypatch):
    Image.new("RGB", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"bomb.png is too large.*tiles"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK"])
def test_images_of_every_mode_become_rgb(mode, tmp_path):
    gray = np.arange(0, 250, 5, dtype=np.uint8).reshape(5, 10)
    rgb = read_image(Image.fromarray(gray).convert(mode))
    assert rgb.mode == "RGB" and rgb.size == (10, 5)
    if mode not in ("1", "P"):
        assert np.abs(np.asarray(rgb)[..., 1].astype(int) - gray).max() <= 1


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (4, 8)


def test_masks_of_every_mode_that_holds_ids(tmp_path):
    ids = label_map()
    expected = np.where(ids == 9, 255, ids)
    palette = Image.fromarray(ids, mode="P")
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    palette.save(tmp_path / "palette.png")
    Image.fromarray(ids.astype(np.uint16)).save(tmp_path / "deep.png")
    assert (read_label(tmp_path / "palette.png", SPEC) == expected).all()
    assert (read_label(tmp_path / "deep.png", SPEC) == expected).all()
    rgb = np.zeros((2, 2, 3), np.uint8)
    rgb[0, 1, 0] = 255
    assert read_label(png(rgb), SPEC).tolist() == [[0, 1], [0, 0]]
    two = LabelSpec("two", ("off", "on"))
    assert read_label(Image.fromarray(np.array([[True, False]])), two).tolist() == [[1, 0]]
    with pytest.raises(InputError, match="mode LA, which holds no class ids"):
        read_label(Image.new("LA", (2, 2)), SPEC)


def test_a_damaged_image_inside_a_shard_is_named_by_its_id(tmp_path):
    pack(load_segmentation(write_pairs(tmp_path / "pairs"), "train"), tmp_path / "shards", "train")
    path = tmp_path / "shards/train-00000-of-00001.parquet"
    table = datasets.Dataset.from_parquet(str(path)).cast_column("image", datasets.Image(decode=False))
    rows = table.to_list()
    rows[2]["image"] = {"bytes": rows[2]["image"]["bytes"][:200], "path": None}
    datasets.Dataset.from_list(rows, features=table.features).to_parquet(path)
    (tmp_path / "shards/train.manifest.json").unlink()  # otherwise the changed file size would be reported first
    with pytest.raises(InputError, match=rf"{rows[2]['id']} \(image\) is damaged"):
        load_segmentation(tmp_path / "shards", "train").dataset[2]
