"""Every benchmark from its files as distributed: miniature copies of each layout, as folders and as archives.

The tables here were written from the publications, independently of the package.
"""

import functools
import io
import itertools
import json
import os
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from hf_denseseg.cli import main
from hf_denseseg.data.checks.segmentation import scan_segmentation_source
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.reading import matlab
from hf_denseseg.data.reading.matlab import read_matlab_ids
from hf_denseseg.data.reading.references import read_reference
from hf_denseseg.data.segmentation import load_segmentation
from hf_denseseg.data.shards.packing import pack
from hf_denseseg.data.sources.benchmarks.layouts import NAMES, get_benchmark
from hf_denseseg.errors import InputError
from reference import REPOSITORY

scipy_io = pytest.importorskip("scipy.io")

CAMVID = Path(os.environ.get("DENSESEG_CAMVID", REPOSITORY.parent / "shared/data/camvid"))
SIZE = (6, 8)  # height, width in pixels
CITYSCAPES = dict(zip((7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33), range(19), strict=True))
COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)  # labels.txt: ids of COCO that are never annotated
COCO = {raw: train for train, raw in enumerate(raw for raw in range(1, 183) if raw not in COCO_GAPS)}
# Ids 2 aeroplane .. 458 wood of the 459, in the alphabetical order of the 59 names.
CONTEXT = (
    *(2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158),
    *(159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366),
    *(368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458),
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("DENSESEG_DATA_ROOT", raising=False)


def image(mode="RGB", form="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, SIZE[::-1], 90 if mode == "L" else (10, 90, 200)).save(buffer, form)
    return buffer.getvalue()


def label(raw, form="png", key="S"):
    buffer = io.BytesIO()
    if form == "mat":
        scipy_io.savemat(buffer, {"captions": "two dogs", key: raw}, do_compression=True)
    else:
        Image.fromarray(raw).save(buffer, "PNG")
    return buffer.getvalue()


def ids_of(values, seed=0, dtype=np.uint8):
    """A label map that cycles through the values, starting at a different one for each seed."""
    return np.resize(np.roll(np.array(values, dtype), -seed), SIZE)


def write(root, archives, packed):
    """Write {archive: {member: content}} as these archives, or unpacked."""
    for archive, files in archives.items():
        if not packed:
            for name, content in files.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(content)
        elif archive.endswith(".zip"):
            with zipfile.ZipFile(root / archive, "w", zipfile.ZIP_DEFLATED) as out:
                for name, content in files.items():
                    out.writestr(name, content)
        else:
            with tarfile.open(root / archive, "w:gz" if archive.endswith("gz") else "w") as out:
                for name, content in files.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    out.addfile(member, io.BytesIO(content))
    return root


def ade20k(seed):
    """Archives with one miniature image per split, the id of each, and the expected labels."""
    raw = ids_of(range(151), 7 * seed)
    archives = {"ADEChallengeData2016.zip": {}, "release_test.zip": {}}
    for split, folder in (("train", "training"), ("val", "validation")):
        stem = f"ADE_{split}_{seed:08d}"
        root = "ADEChallengeData2016"
        archives[f"{root}.zip"] |= {
            f"{root}/images/{folder}/{stem}.jpg": image("L", "JPEG"),  # some of them are gray
            f"{root}/annotations/{folder}/{stem}.png": label(raw),
            f"{root}/objectInfo150.txt": b"Idx\tRatio\tTrain\tVal\tName\n",
        }
    archives["release_test.zip"][f"release_test/testing/ADE_test_{seed:08d}.jpg"] = image("RGB", "JPEG")
    return archives, {"train": f"ADE_train_{seed:08d}", "val": f"ADE_val_{seed:08d}"}, np.where(raw == 0, 255, raw - 1)


def cityscapes(seed, kind="gtFine"):
    raw = ids_of(range(34), 5 * seed)
    fine = kind == "gtFine"
    images = ("leftImg8bit_trainvaltest.zip", "leftImg8bit_trainextra.zip")
    labels = "gtFine_trainvaltest.zip" if fine else "gtCoarse.zip"
    archives, ids = {images[0]: {}, images[1]: {}, labels: {}}, {}
    for split, city in (
        ("train", "ulm"),
        ("val", "munster"),
        ("test", "bonn") if fine else ("train_extra", "erlangen"),
    ):
        stem = f"{city}_{seed:06d}_000019"
        archives[images[split == "train_extra"]][f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png"] = image()
        below = f"{kind}/{split}/{city}/{stem}_{kind}"
        content = np.full(SIZE, 3, np.uint8) if split == "test" else raw  # dummy labels: out of the region of interest
        archives[labels] |= {
            f"{below}_labelIds.png": label(content),
            f"{below}_instanceIds.png": label(content.astype(np.uint16)),
            f"{below}_color.png": image(),
            f"{below}_polygons.json": b"{}",
            "license.txt": b"in each of the archives",
        }
        archives[images[0]]["license.txt"] = b"in each of the archives"
        ids[split] = stem
    return archives, ids, np.vectorize(lambda value: CITYSCAPES.get(value, 255))(raw)


def pascal_context(seed, background=False, png=False):
    if png:
        raw = ids_of(range(60), 11 * seed)
        expected = raw.astype(int) if background else np.where(raw == 0, 255, raw.astype(int) - 1)
    else:
        raw = ids_of((*CONTEXT, 1, 431, 459, 7), 11 * seed, np.uint16)  # 431: unknown
        train = {value: index + background for index, value in enumerate(CONTEXT)}
        expected = np.vectorize(lambda value: train.get(value, 0 if background else 255))(raw)
    below, voc, context, ids = "VOCdevkit/VOC2010", {}, {}, {}
    for number, split in enumerate(("train", "val")):
        stem = f"20{number + 8:02d}_{seed:06d}"
        voc[f"{below}/JPEGImages/{stem}.jpg"] = image("RGB", "JPEG")
        voc[f"{below}/JPEGImages/2010_{seed:06d}.jpg"] = image("RGB", "JPEG")  # in neither list
        if png:
            voc[f"{below}/SegmentationClassContext/{stem}.png"] = label(raw)
        else:
            context[f"trainval/{stem}.mat"] = label(raw, "mat", "LabelMap")
        ids[split] = stem
    return {"VOCtrainval_03-May-2010.tar": voc, "trainval.tar.gz": context}, ids, expected


def coco_stuff_10k(seed):
    raw = ids_of(range(183), 13 * seed)
    raw[np.isin(raw, COCO_GAPS)] = 0
    files, ids = {}, {}
    for number, split in enumerate(("train", "test")):
        stem = f"COCO_train2014_{seed + 100 * number:012d}"
        files |= {
            f"images/{stem}.jpg": image("RGB", "JPEG"),
            f"annotations/{stem}.mat": label(raw, "mat"),
        }
        ids[split] = stem
    return {"cocostuff-10k-v1.1.zip": files}, ids, np.vectorize(lambda value: COCO.get(value, 255))(raw)


def coco_stuff_164k(seed):
    raw = ids_of((*range(182), 255), 13 * seed)
    raw[np.isin(raw, [gap - 1 for gap in COCO_GAPS])] = 255
    archives, ids = {"stuffthingmaps_trainval2017.zip": {}}, {}
    for number, split in enumerate(("train", "val")):
        stem = f"{seed + 100 * number:012d}"
        archives[f"{split}2017.zip"] = {f"{split}2017/{stem}.jpg": image("RGB", "JPEG")}
        archives["stuffthingmaps_trainval2017.zip"][f"{split}2017/{stem}.png"] = label(raw)
        ids[split] = stem
    return archives, ids, np.vectorize(lambda value: COCO.get(value + 1, 255))(raw)


def camvid(seed):
    raw = ids_of(range(12), seed)
    files, ids = {}, {}
    for split, stem in (("train", "0006R0_f"), ("val", "0016E5_0"), ("test", "Seq05VD_f")):
        ids[split] = f"{stem}{7990 + seed:04d}"
        files |= {
            f"CamVid/{split}/{ids[split]}.png": image(),
            f"CamVid/{split}annot/{ids[split]}.png": label(raw),
        }
        files[f"CamVid/{split}.txt"] = b"/SegNet/CamVid/..."
    return {"CamVid.zip": files}, ids, np.where(raw == 11, 255, raw)


# label_colors.txt of the authors, and SegNet's grouping of the names; a color without a class is ignored.
CAMVID_COLORS = {
    "Animal": (64, 128, 64, "pedestrian"),
    "Archway": (192, 0, 128, "building"),
    "Bicyclist": (0, 128, 192, "bicyclist"),
    "Bridge": (0, 128, 64, "building"),
    "Building": (128, 0, 0, "building"),
    "Car": (64, 0, 128, "car"),
    "CartLuggagePram": (64, 0, 192, "pedestrian"),
    "Child": (192, 128, 64, "pedestrian"),
    "Column_Pole": (192, 192, 128, "pole"),
    "Fence": (64, 64, 128, "fence"),
    "LaneMkgsDriv": (128, 0, 192, "road"),
    "LaneMkgsNonDriv": (192, 0, 64, "road"),
    "Misc_Text": (128, 128, 64, "sign"),
    "MotorcycleScooter": (192, 0, 192, "bicyclist"),
    "OtherMoving": (128, 64, 64, "car"),
    "ParkingBlock": (64, 192, 128, "pavement"),
    "Pedestrian": (64, 64, 0, "pedestrian"),
    "Road": (128, 64, 128, "road"),
    "RoadShoulder": (128, 128, 192, "pavement"),
    "Sidewalk": (0, 0, 192, "pavement"),
    "SignSymbol": (192, 128, 128, "sign"),
    "Sky": (128, 128, 128, "sky"),
    "SUVPickupTruck": (64, 128, 192, "car"),
    "TrafficCone": (0, 0, 64, "pole"),
    "TrafficLight": (0, 64, 64, "sign"),
    "Train": (192, 64, 128, "car"),
    "Tree": (128, 128, 0, "tree"),
    "Truck_Bus": (192, 128, 192, "car"),
    "Tunnel": (64, 0, 64, "building"),
    "VegetationMisc": (192, 192, 0, "tree"),
    "Void": (0, 0, 0, None),
    "Wall": (64, 192, 0, "building"),
}
CAMVID_11 = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")


def camvid_original(seed, grouped=False):
    rows = list(CAMVID_COLORS.items())
    numbers = ids_of(range(32), seed)
    colors = np.array([row[:3] for _, row in rows], np.uint8)[numbers]
    names = [name for name, _ in rows if name != "Void"]
    train = [
        255 if name == "Void" else CAMVID_11.index(row[3]) if grouped else names.index(name) for name, row in rows
    ]
    archives, ids = {"701_StillsRaw_full.zip": {}, "LabeledApproved_full.zip": {}}, {}
    stems = {
        "train": f"0001TP_{6690 + seed:06d}",
        "val": f"0016E5_{7961 + seed:05d}",
        "test": f"0001TP_{8550 + seed:06d}",
    }
    for split, stem in stems.items():
        archives["701_StillsRaw_full.zip"][f"701_StillsRaw_full/{stem}.png"] = image()
        archives["LabeledApproved_full.zip"][f"{stem}_L.png"] = label(colors)
        ids[split] = stem
    return archives, ids, np.array(train)[numbers]


WRITERS = {
    "ade20k": ade20k,
    "cityscapes": cityscapes,
    "cityscapes_coarse": lambda seed: cityscapes(seed, "gtCoarse"),
    "pascal_context_59": pascal_context,
    "pascal_context_60": lambda seed: pascal_context(seed, background=True),
    "coco_stuff_10k": coco_stuff_10k,
    "coco_stuff_164k": coco_stuff_164k,
    "camvid": camvid,
    "camvid_32": camvid_original,
    "camvid_full": lambda seed: camvid_original(seed, grouped=True),
}


def build(root, writer, packed, count=3):
    """Write a miniature copy; returns split -> {id: expected labels}."""
    together, expected = {}, {}
    for seed in range(count):
        archives, ids, labels = writer(seed)
        for archive, files in archives.items():
            together.setdefault(archive, {}).update(files)
        for split, name in ids.items():
            expected.setdefault(split, {})[name] = labels
    lists = {split: "".join(f"{name}\n" for name in names).encode() for split, names in expected.items()}
    for archive, files in together.items():
        if archive.startswith("VOC"):
            files |= {f"VOCdevkit/VOC2010/ImageSets/Main/{split}.txt": text for split, text in lists.items()}
        if archive.startswith("cocostuff"):
            files |= {f"imageLists/{split}.txt": text for split, text in lists.items()}
    root.mkdir(parents=True, exist_ok=True)
    write(root, together, packed)
    return expected


def check(data, expected):
    rows = list(data.dataset)
    assert [row["id"] for row in rows] == sorted(expected)
    for row in rows:
        assert row["image"].mode == "RGB" and row["image"].size == SIZE[::-1]
        assert row["label"].dtype == np.uint8
        np.testing.assert_array_equal(row["label"], expected[row["id"]])


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "archives"])
@pytest.mark.parametrize("name", NAMES)
def test_each_benchmark_loads_from_its_official_files(tmp_path, name, packed):
    expected = build(tmp_path / "official", WRITERS[name], packed)
    for split, labels in expected.items():
        if (name, split) != ("cityscapes", "test"):
            check(load_segmentation(name, split, root=tmp_path / "official"), labels)
    second = "test" if name == "coco_stuff_10k" else "val"
    both = load_segmentation(name, f"train+{second}", root=tmp_path / "official", streaming=True)
    check(both, expected["train"] | expected[second])


# name: classes, first and last class, colors of these two, images of each split.
PUBLISHED = {
    "ade20k": (150, "wall", "flag", (120, 120, 120), (92, 0, 255), {"train": 20210, "val": 2000, "test": 3352}),
    "cityscapes": (
        *(19, "road", "bicycle", (128, 64, 128), (119, 11, 32)),
        {"train": 2975, "val": 500, "test": 1525, "train_extra": 19998},
    ),
    "cityscapes_coarse": (
        *(19, "road", "bicycle", (128, 64, 128), (119, 11, 32)),
        {"train": 2975, "val": 500, "train_extra": 19998},
    ),
    "pascal_context_59": (59, "aeroplane", "wood", (180, 120, 120), (31, 0, 255), {"train": 4998, "val": 5105}),
    "pascal_context_60": (60, "background", "wood", (120, 120, 120), (31, 0, 255), {"train": 4998, "val": 5105}),
    "coco_stuff_10k": (
        *(171, "person", "wood", (0, 192, 64), (64, 64, 0)),
        {"train": 9000, "test": 1000, "val": 1000},
    ),
    "coco_stuff_164k": (171, "person", "wood", (0, 192, 64), (64, 64, 0), {"train": 118287, "val": 5000}),
    "camvid": (11, "sky", "bicyclist", (128, 128, 128), (0, 128, 192), {"train": 367, "val": 101, "test": 233}),
    "camvid_32": (31, "Animal", "Wall", (64, 128, 64), (64, 192, 0), {"train": 367, "val": 101, "test": 233}),
    "camvid_full": (11, "sky", "bicyclist", (128, 128, 128), (0, 128, 192), {"train": 367, "val": 101, "test": 233}),
}


@pytest.mark.parametrize("name", NAMES)
def test_classes_colors_and_counts_are_the_published_ones(name):
    count, first, last, first_color, last_color, sizes = PUBLISHED[name]
    benchmark = get_benchmark(name)
    for spec in benchmark.encodings.values():
        assert (spec.num_labels, spec.classes[0], spec.classes[-1]) == (count, first, last)
        assert (spec.palette[0], spec.palette[-1]) == (first_color, last_color) and len(spec.palette) == count
        assert spec.source_url and spec.license and spec.citation
        assert LabelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert {split: files.size for split, files in benchmark.splits.items()} == sizes


def test_pascal_context_is_in_alphabetical_order_and_60_is_59_after_the_background():
    classes = get_benchmark("pascal_context_59").spec.classes
    assert list(classes) == sorted(classes)
    assert get_benchmark("pascal_context_60").spec.classes == ("background", *classes)


def test_cityscapes_classes_have_the_seven_categories():
    spec = get_benchmark("cityscapes").spec
    assert list(spec.categories) == ["flat", "construction", "object", "nature", "sky", "human", "vehicle"]
    assert [name for names in spec.categories.values() for name in names] == list(spec.classes)
    assert spec.decode(np.array([0, 18, 255])).tolist() == [7, 33, 0]  # raw ids that the evaluation server expects


@pytest.mark.parametrize("background", [False, True])
def test_pascal_context_in_mmsegmentation_format(tmp_path, background):
    writer = functools.partial(pascal_context, background=background, png=True)
    expected = build(tmp_path, writer, False)
    (tmp_path / "VOCdevkit/VOC2010/ImageSets/Main").rename(
        tmp_path / "VOCdevkit/VOC2010/ImageSets/SegmentationContext"
    )
    check(load_segmentation(f"pascal_context_{59 + background}", "val", root=tmp_path), expected["val"])


def test_converted_train_ids_are_used_only_if_the_official_ids_are_missing(tmp_path):
    expected = build(tmp_path, cityscapes, False)
    for file in list(tmp_path.glob("gtFine/*/*/*_labelIds.png")):
        train = Image.fromarray(np.full(SIZE, 5, np.uint8))
        train.save(file.with_name(file.name.replace("labelIds", "labelTrainIds")))
    check(load_segmentation("cityscapes", "val", root=tmp_path), expected["val"])
    for file in tmp_path.glob("gtFine/*/*/*_labelIds.png"):
        file.unlink()
    data = load_segmentation("cityscapes", "val", root=tmp_path)
    assert all((row["label"] == 5).all() for row in data.dataset) and data.spec.raw_to_train[5] == 5


@pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid is not at $DENSESEG_CAMVID or ../shared/data/camvid")
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_original_camvid_is_split_like_the_segnet_copy(split):
    names = [file.stem for file in (CAMVID / split / "images").iterdir()]
    for each in ("train", "val", "test"):
        holds = get_benchmark("camvid_full").splits[each].holds
        assert all(holds(name) == (each == split) for name in names)


def run_lengths(area):
    """Uncompressed run lengths of a mask in column-major order, starting with zeros."""
    flat = area.T.ravel()
    ends = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), len(flat)]
    return [0] * int(flat[0]) + [last - first for first, last in itertools.pairwise(ends)]


@pytest.mark.parametrize("background", [False, True])
def test_pascal_context_in_detail_api_format(tmp_path, background):
    writer = functools.partial(pascal_context, background=background)
    expected = build(tmp_path, writer, False)["val"]
    coco_mask = pytest.importorskip("pycocotools.mask")
    images, areas = [], []
    for number, file in enumerate(sorted((tmp_path / "trainval").glob("*.mat"))):
        raw = scipy_io.loadmat(file)["LabelMap"]
        images.append({"image_id": number, "file_name": f"{file.stem}.jpg", "height": SIZE[0], "width": SIZE[1]})
        # The first area fills the image and is covered by the others.
        masks = [(raw.flat[0], np.ones(SIZE, int)), *((each, (raw == each).astype(int)) for each in np.unique(raw))]
        for raw_id, mask in masks:
            packed = coco_mask.frPyObjects({"size": list(SIZE), "counts": run_lengths(mask)}, *SIZE)
            packed["counts"] = packed["counts"].decode()
            kept = int(raw_id) if raw_id in CONTEXT else 0  # that file only has the 59 classes
            areas.append({"image_id": number, "category_id": kept, "segmentation": packed})
        file.unlink()
    merged = tmp_path / "trainval_merged.json"
    merged.write_text(json.dumps({"images": images, "annos_segmentation": areas}))
    check(load_segmentation(f"pascal_context_{59 + background}", "val", root=tmp_path), expected)
    merged.write_text('{"images": []}')
    with pytest.raises(InputError, match="is not an annotation file of Pascal Context"):
        load_segmentation(f"pascal_context_{59 + background}", "val", root=tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        '{"size": [5, 5], "areas": [[1, {"counts": 7}, "x"]]}',
        '{"size": [5, 5], "areas": [[1, {"counts": "zzzz"}, "x"]]}',
        '{"size": [5, 5], "areas": [[1, {"counts": [3, 4]}, "x"]]}',
        '{"size": [9000000, 9000000], "areas": []}',
        "[5, 5]",
        "x",
    ],
)
def test_invalid_run_lengths_are_rejected(text):
    with pytest.raises(InputError, match="Label map p1 has an invalid encoding in"):
        read_reference(f"rle://p1?{text}")


@pytest.mark.parametrize("by_path", [False, True])
def test_coco_stuff_10k_in_mmsegmentation_format(tmp_path, by_path):
    raw = ids_of(range(172))
    files = {"imagesLists/test.txt": b"COCO_train2014_000000000009\n"}
    for split, stem in (("train", "COCO_train2014_000000000001"), ("test", "COCO_train2014_000000000009")):
        files[f"images/{split}2014/{stem}.jpg"] = image("RGB", "JPEG")
        files[f"annotations/{split}2014/{stem}_labelTrainIds.png"] = label(raw)
    write(tmp_path, {"unpacked": files}, False)
    source = (tmp_path, {"spec": "coco_stuff_10k"}) if by_path else ("coco_stuff_10k", {"root": tmp_path})
    expected = np.where(raw == 0, 255, raw.astype(int) - 1)
    check(load_segmentation(source[0], "val", **source[1]), {"COCO_train2014_000000000009": expected})


def test_coco_stuff_164k_in_mmsegmentation_format(tmp_path):
    raw = ids_of((*range(171), 255))
    stem = "000000000139"
    files = {
        f"images/val2017/{stem}.jpg": image("RGB", "JPEG"),
        f"annotations/val2017/{stem}_labelTrainIds.png": label(raw),
    }
    write(tmp_path, {"unpacked": files}, False)
    check(load_segmentation("coco_stuff_164k", "val", root=tmp_path), {stem: raw})


@pytest.mark.parametrize(("name", "split", "count"), [("cityscapes", "test", 3), ("ade20k", "test", 3)])
def test_a_test_split_without_published_labels_is_all_ignored(tmp_path, name, split, count):
    build(tmp_path, WRITERS[name], True)
    rows = list(load_segmentation(name, split, root=tmp_path).dataset)
    assert len(rows) == count and all((row["label"] == 255).all() for row in rows)
    assert rows[0]["id"] == ("bonn_000000_000019" if name == "cityscapes" else "ADE_test_00000000")
    scan = scan_segmentation_source(name, split, root=tmp_path)
    assert not scan.faults and scan.images == 3 and "labels of this split are not published" in " ".join(scan.notes)
    with pytest.raises(InputError, match="never published"):
        pack(load_segmentation(name, split, root=tmp_path), tmp_path / "shards", "test")


def test_the_folder_is_found_in_the_root_the_variable_and_the_current_folder(tmp_path, monkeypatch):
    expected = build(tmp_path / "data/CamVid", camvid, False)["train"]
    check(load_segmentation("camvid", "train", root=tmp_path / "data"), expected)
    monkeypatch.setenv("DENSESEG_DATA_ROOT", str(tmp_path / "data"))
    check(load_segmentation("camvid", "train"), expected)
    monkeypatch.delenv("DENSESEG_DATA_ROOT")
    monkeypatch.chdir(tmp_path / "data")
    check(load_segmentation("camvid", "train"), expected)


def test_an_official_folder_or_archive_is_recognized_by_path(tmp_path):
    expected = build(tmp_path, ade20k, True)["val"]
    check(load_segmentation(tmp_path, "val"), expected)
    data = load_segmentation(tmp_path / "ADEChallengeData2016.zip", "validation")
    check(data, expected)
    assert data.spec == get_benchmark("ade20k").spec
    assert scan_segmentation_source(str(tmp_path), "val").spec == data.spec


def test_files_of_two_benchmarks_need_the_name(tmp_path):
    expected = build(tmp_path, pascal_context, True)["val"]
    with pytest.raises(InputError, match="may be pascal_context_59 or pascal_context_60.*--data_root"):
        load_segmentation(tmp_path, "val")
    check(load_segmentation(tmp_path, "val", spec="pascal_context_59"), expected)


def test_error_for_a_missing_benchmark_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"cityscapes-dataset\.com.*registration.*leftImg8bit_train\*\.zip.*DATA_ROOT"
    ):
        load_segmentation("cityscapes", "train")
    with pytest.raises(InputError, match="does not exist. Fix data_root"):
        load_segmentation("cityscapes", "train", root=tmp_path / "nowhere")
    with pytest.raises(InputError, match="data_root is the location of a benchmark"):
        load_segmentation("synthetic", "train", root=tmp_path)
    with pytest.raises(InputError, match="no encoding 'train'; known: label_ids, train_ids"):
        load_segmentation(tmp_path, "train", spec="cityscapes:train")


def test_missing_and_unpaired_files_are_named(tmp_path):
    build(tmp_path, cityscapes, False)
    unpaired = next(tmp_path.glob("gtFine/val/*/*_labelIds.png"))
    content = unpaired.read_bytes()
    unpaired.unlink()
    with pytest.raises(InputError, match=r"munster_000000_000019_leftImg8bit\.png has no label map"):
        load_segmentation("cityscapes", "val", root=tmp_path)
    assert len(scan_segmentation_source("cityscapes", "val", root=tmp_path).faults) == 1
    unpaired.write_bytes(content)
    next(tmp_path.glob("leftImg8bit/val/*/*000001_*")).unlink()
    with pytest.raises(InputError, match=r"munster_000001_000019_gtFine_labelIds\.png has no image"):
        load_segmentation("cityscapes", "val", root=tmp_path)
    with pytest.raises(InputError, match="split train_extra, in .*: no images"):
        load_segmentation("cityscapes", "train_extra", root=tmp_path)
    with pytest.raises(InputError, match="train, train_extra, val"):
        load_segmentation("cityscapes", "holdout", root=tmp_path)


def test_a_partial_copy_is_noted_but_a_missing_listed_image_is_rejected(tmp_path, caplog):
    expected = build(tmp_path, coco_stuff_10k, False)["test"]
    check(load_segmentation("coco_stuff_10k", "val", root=tmp_path), expected)
    assert "3 of 1,000 images" in caplog.text
    (tmp_path / "images" / f"{min(expected)}.jpg").unlink()
    with pytest.raises(InputError, match="1 images are missing, first COCO_train2014_000000000100"):
        load_segmentation("coco_stuff_10k", "val", root=tmp_path)


@pytest.mark.parametrize("state", ["black", "cut", "good"])
def test_the_image_of_train_extra_is_left_out_only_if_it_is_damaged(tmp_path, caplog, state):
    expected = build(tmp_path, WRITERS["cityscapes_coarse"], False)["train_extra"]
    image = tmp_path / "leftImg8bit/train_extra/troisdorf/troisdorf_000000_000073_leftImg8bit.png"
    labels = tmp_path / "gtCoarse/train_extra/troisdorf/troisdorf_000000_000073_gtCoarse_labelIds.png"
    for file in (image, labels):
        file.parent.mkdir(parents=True)
    image_of = np.zeros((*SIZE, 3), np.uint8) if state == "black" else ids_of(range(200))
    Image.fromarray(image_of).save(image)
    if state == "cut":
        image.write_bytes(image.read_bytes()[:40])
    labels.write_bytes(label(np.full(SIZE, 7, np.uint8)))
    rows = list(load_segmentation("cityscapes_coarse", "train_extra", root=tmp_path).dataset)
    assert len(rows) == len(expected) + (state == "good")
    assert ("troisdorf_000000_000073 is left out" in caplog.text) == (state != "good")


def test_splits_of_any_folder_can_be_combined(tmp_path):
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / split / kind).mkdir(parents=True)
            (tmp_path / split / kind / "p0.png").write_bytes(image() if kind == "images" else label(ids_of([0, 1])))
    (tmp_path / "classes.json").write_text('{"classes": ["a", "b"]}')
    assert [row["id"] for row in load_segmentation(tmp_path, "train+val").dataset] == ["train/p0", "val/p0"]
    with pytest.raises(InputError, match="different names joined"):
        load_segmentation(tmp_path, "train+train")


def copy_as_parquet(folder, maps):
    """A third-party repository with a copy of a benchmark."""
    rows = {
        "image": [{"bytes": label(np.zeros((*each.shape[:2], 3), np.uint8)), "path": None} for each in maps],
        "annotation": [{"bytes": label(each), "path": None} for each in maps],
    }
    features = datasets.Features({key: datasets.Image() for key in rows})
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def drawn_maps(ids):
    """32 label maps whose pixels are sampled from the ids."""
    rng = np.random.default_rng(0)
    return [rng.choice(np.array(ids, np.uint8), (24, 24)) for _ in range(32)]


CITY_IDS = (*range(34),)
COCO_10K = (0, *COCO)
COCO_164K = (*(raw - 1 for raw in COCO), 255)


@pytest.mark.parametrize(
    ("name", "ids"),
    [("cityscapes", CITY_IDS), ("coco_stuff_10k", COCO_10K), ("coco_stuff_164k", COCO_164K), ("camvid", range(12))],
)
def test_a_copy_with_the_official_ids_is_read(tmp_path, name, ids):
    data = load_segmentation(copy_as_parquet(tmp_path / "copy", drawn_maps(ids)), "train", spec=name)
    assert len(list(data.dataset)) == 32 and data.spec == get_benchmark(name).spec


@pytest.mark.parametrize(
    ("name", "ids", "fitting"),
    [
        ("cityscapes", (*range(19), 255), "cityscapes:train_ids"),
        ("cityscapes", range(19), "cityscapes:train_ids"),  # without a single ignored pixel as a hint
        ("ade20k", (*range(150), 255), "ade20k:train_ids"),
        ("coco_stuff_10k", COCO_164K, "coco_stuff_164k:png_ids"),
        ("coco_stuff_164k", COCO_10K, "coco_stuff_10k:mat_ids"),
        ("coco_stuff_164k", (*range(171), 255), "train_ids"),
        ("pascal_context_59", range(60), "pascal_context_59:png_ids"),
        ("camvid", (*range(11), 255), "camvid:train_ids"),
        ("cityscapes", range(100, 120), "100-119 are not among them"),
    ],
)
def test_a_copy_in_another_encoding_is_rejected_and_the_encoding_named(tmp_path, name, ids, fitting):
    copy = copy_as_parquet(tmp_path / "copy", drawn_maps(ids))
    with pytest.raises(InputError, match=f"first 32 label maps contain the ids .*{fitting}"):
        load_segmentation(copy, "train", spec=name)
    if fitting.startswith(name):
        data = load_segmentation(copy, "train", spec=fitting)
        assert np.unique([row["label"] for row in data.dataset]).max() in (data.spec.num_labels - 1, 255)


@pytest.mark.parametrize("first", [0, 1], ids=["reduced", "official"])
def test_reduced_ade20k_ids_are_detected_by_class_frequencies(tmp_path, first):
    """Without an ignored pixel and without flags (150), the ids fit both encodings."""
    # objectInfo150.txt: wall, building, sky, floor, tree, ceiling, road, bed, windowpane, ... of 20,210 images
    counts = (11664, 6046, 8265, 9336, 6678, 6604, 4023, 1906, 4688, 2423, 2874, 3068, 5075, 1804, 6666, 4269, 1691)
    rng = np.random.default_rng(0)
    maps = []
    for _ in range(32):
        show = np.flatnonzero(rng.random(len(counts)) < np.array(counts) / 20210) + first
        maps.append(np.resize(show if len(show) else [first], SIZE).astype(np.uint8))
    copy = copy_as_parquet(tmp_path / "copy", maps)
    if first:
        assert len(load_segmentation(copy, "train", spec="ade20k").dataset) == 32
    else:
        with pytest.raises(
            InputError, match=r"the class frequencies differ from the published ones.*ade20k:train_ids"
        ):
            load_segmentation(copy, "train", spec="ade20k")


def test_color_masks_of_the_full_ade20k_release_are_rejected(tmp_path):
    maps = [np.zeros((*SIZE, 3), np.uint8)] * 3
    with pytest.raises(InputError, match="is a color image, like those of the full ADE20K"):
        load_segmentation(copy_as_parquet(tmp_path / "copy", maps), "train", spec="ade20k")


@pytest.mark.parametrize("revision", [None, "main", "v1.0"])
@pytest.mark.parametrize("online", [False, True])
def test_a_copy_on_the_hub_needs_its_commit_hash(monkeypatch, revision, online):
    def dataset_info(self, name, revision):
        if not online:
            raise ConnectionError("offline")
        return SimpleNamespace(sha="c0ffee" * 6 + "0000")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    with pytest.raises(InputError, match="its commit hash") as caught:
        load_segmentation("somebody/cityscapes", "train", spec="cityscapes", revision=revision)
    assert ("the current one is c0ffeec0ffee" in str(caught.value)) == online
    with pytest.raises(InputError, match="needs a label specification"):
        load_segmentation("somebody/cityscapes", "train", revision=revision)


@settings(max_examples=40, deadline=None)
@given(
    places=st.lists(st.tuples(st.integers(0, 2**14), st.integers(0, 255)), min_size=1, max_size=6), cut=st.booleans()
)
def test_damaged_mat_files_are_rejected_or_read_as_a_map(places, cut):
    content = bytearray(label(ids_of(range(183)), "mat"))
    for place, value in places:
        content[place % len(content)] = value
    if cut:
        del content[places[0][0] % len(content) :]
    try:
        assert read_matlab_ids(bytes(content), "x.mat").ndim == 2
    except InputError as error:
        assert "x.mat" in str(error)


def test_a_mat_file_of_gigabytes_is_rejected_before_it_is_unpacked(monkeypatch):
    buffer = io.BytesIO()
    scipy_io.savemat(buffer, {"S": np.zeros((3000, 3000), np.uint16)}, do_compression=True)
    assert read_matlab_ids(buffer.getvalue(), "x.mat").shape == (3000, 3000)
    monkeypatch.setattr(matlab, "_LIMIT", 2**22)
    with pytest.raises(InputError, match="a variable of more than 4,194,304 bytes"):
        read_matlab_ids(buffer.getvalue(), "x.mat")


def test_the_list_names_every_benchmark_with_its_license_and_files(capsys):
    assert main(["data", "list"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in NAMES:
        assert f"{name}: {PUBLISHED[name][0]} classes" in text
    assert "no redistribution" in text and "gtFine*.zip" in text and "DENSESEG_DATA_ROOT" in text
    assert "coco: 80 classes" in text and "ILSVRC2012_img_train.tar" in text


def test_an_image_bomb_in_an_archive_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    files = {}
    for kind, folder in (("images", "training"), ("annotations", "training")):
        suffix = "jpg" if kind == "images" else "png"
        name = f"ADEChallengeData2016/{kind}/{folder}/ADE_train_00000001.{suffix}"
        files[name] = label(np.zeros((100, 200), np.uint8))
    write(tmp_path, {"ADEChallengeData2016.zip": files}, True)
    rows = load_segmentation("ade20k", "train", root=tmp_path).dataset
    with pytest.raises(InputError, match=r"ADE_train_00000001\.jpg in .*2016\.zip is too large to be opened safely"):
        rows[0]


def test_loader_processes_read_archives_like_the_main_process(tmp_path):
    expected = build(tmp_path, coco_stuff_164k, True)["train"]
    rows = load_segmentation("coco_stuff_164k", "train", root=tmp_path).dataset
    loader = DataLoader(
        rows, batch_size=None, num_workers=2, multiprocessing_context="fork", collate_fn=lambda row: row
    )
    labels = {row["id"]: row["label"] for row in loader}
    assert labels.keys() == expected.keys()
    for name, found in labels.items():
        np.testing.assert_array_equal(found, expected[name])


def test_data_check_accepts_a_benchmark_by_name(tmp_path, capsys):
    build(tmp_path, camvid_original, True)
    arguments = ["data", "check", "camvid_32", "--data_root", str(tmp_path), "--split", "train+val"]
    assert main(arguments) == 0
    assert "6 pairs, no faults." in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "LabeledApproved_full.zip", "a") as archive:
        archive.writestr("0001TP_006999_L.png", label(np.full((*SIZE, 3), 7, np.uint8)))
    with zipfile.ZipFile(tmp_path / "701_StillsRaw_full.zip", "a") as archive:
        archive.writestr("701_StillsRaw_full/0001TP_006999.png", image())
    assert main(arguments) == 2
    assert "0001TP_006999_L.png in" in (printed := capsys.readouterr().out) and "[[7, 7, 7]]" in printed
