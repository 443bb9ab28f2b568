"""Every benchmark from the files as they are distributed: miniature copies of each layout, as folder and as archives.

The tables here are written from the publications, not from the package.
"""

import io
import tarfile
import zipfile

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_denseseg.data.benchmarks.layouts import NAMES
from hf_denseseg.data.datasets import load_segmentation

scipy_io = pytest.importorskip("scipy.io")

SIZE = (6, 8)  # height, width in pixels
CITYSCAPES = dict(zip((7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33), range(19), strict=True))
COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)  # labels.txt: ids of COCO that nobody drew
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


def picture(mode="RGB", form="PNG"):
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
    """A map that holds the values in turn, begun at another one for each seed."""
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
    """Archives of one miniature picture for each split, and what its labels are."""
    raw = ids_of(range(151), 7 * seed)
    archives = {"ADEChallengeData2016.zip": {}, "release_test.zip": {}}
    for split, folder in (("train", "training"), ("val", "validation")):
        stem = f"ADE_{split}_{seed:08d}"
        root = "ADEChallengeData2016"
        archives[f"{root}.zip"] |= {
            f"{root}/images/{folder}/{stem}.jpg": picture("L", "JPEG"),  # some of them are grey
            f"{root}/annotations/{folder}/{stem}.png": label(raw),
            f"{root}/objectInfo150.txt": b"Idx\tRatio\tTrain\tVal\tName\n",
        }
    archives["release_test.zip"][f"release_test/testing/ADE_test_{seed:08d}.jpg"] = picture("RGB", "JPEG")
    return archives, {"train": f"ADE_train_{seed:08d}", "val": f"ADE_val_{seed:08d}"}, np.where(raw == 0, 255, raw - 1)


def cityscapes(seed, kind="gtFine"):
    raw = ids_of(range(34), 5 * seed)
    fine = kind == "gtFine"
    pictures = ("leftImg8bit_trainvaltest.zip", "leftImg8bit_trainextra.zip")
    labels = "gtFine_trainvaltest.zip" if fine else "gtCoarse.zip"
    archives, ids = {pictures[0]: {}, pictures[1]: {}, labels: {}}, {}
    for split, city in (
        ("train", "ulm"),
        ("val", "munster"),
        ("test", "bonn") if fine else ("train_extra", "erlangen"),
    ):
        stem = f"{city}_{seed:06d}_000019"
        archives[pictures[split == "train_extra"]][f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png"] = picture()
        below = f"{kind}/{split}/{city}/{stem}_{kind}"
        content = np.full(SIZE, 3, np.uint8) if split == "test" else raw  # dummies: out of the region of interest
        archives[labels] |= {
            f"{below}_labelIds.png": label(content),
            f"{below}_instanceIds.png": label(content.astype(np.uint16)),
            f"{below}_color.png": picture(),
            f"{below}_polygons.json": b"{}",
            "license.txt": b"in each of the archives",
        }
        archives[pictures[0]]["license.txt"] = b"in each of the archives"
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
        voc[f"{below}/JPEGImages/{stem}.jpg"] = picture("RGB", "JPEG")
        voc[f"{below}/JPEGImages/2010_{seed:06d}.jpg"] = picture("RGB", "JPEG")  # in neither list
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
            f"images/{stem}.jpg": picture("RGB", "JPEG"),
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
        archives[f"{split}2017.zip"] = {f"{split}2017/{stem}.jpg": picture("RGB", "JPEG")}
        archives["stuffthingmaps_trainval2017.zip"][f"{split}2017/{stem}.png"] = label(raw)
        ids[split] = stem
    return archives, ids, np.vectorize(lambda value: COCO.get(value + 1, 255))(raw)


def camvid(seed):
    raw = ids_of(range(12), seed)
    files, ids = {}, {}
    for split, stem in (("train", "0006R0_f"), ("val", "0016E5_0"), ("test", "Seq05VD_f")):
        ids[split] = f"{stem}{7990 + seed:04d}"
        files |= {
            f"CamVid/{split}/{ids[split]}.png": picture(),
            f"CamVid/{split}annot/{ids[split]}.png": label(raw),
        }
        files[f"CamVid/{split}.txt"] = b"/SegNet/CamVid/..."
    return {"CamVid.zip": files}, ids, np.where(raw == 11, 255, raw)


# label_colors.txt of the authors, and SegNet's grouping of the names; a colour that is no class is void.
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
        archives["701_StillsRaw_full.zip"][f"701_StillsRaw_full/{stem}.png"] = picture()
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
    """Write a miniature copy; returns per split {id: expected labels}."""
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
