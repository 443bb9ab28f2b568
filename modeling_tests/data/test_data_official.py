"""COCO and ImageNet from miniature versions of the official archives, which are written here member by member."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy import io as matlab

from hf_denseseg.cli import main
from hf_denseseg.data.classification import load_classification
from hf_denseseg.data.detection import load_detection
from hf_denseseg.errors import InputError

# From the published table of 1000 synsets: index among the sorted WordNet ids, and name.
SYNSETS = {"n01440764": (0, "tench, Tinca tinca"), "n02012849": (134, "crane (n02012849)"), "n15075141": (999, None)}
CATEGORIES = [{"id": 1, "name": "person"}, {"id": 13, "name": "stop sign"}, {"id": 90, "name": "toothbrush"}]


def jpeg(shade, size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def tar_of(files, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_folder(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def coco_files():
    """Archive -> its members, in the layout of COCO."""
    archives = {"annotations_trainval2017.zip": {}}
    for split, first in (("train2017", 1), ("val2017", 5)):
        images = [{"id": k, "file_name": f"{k:012d}.jpg", "height": 6, "width": 8} for k in range(first, first + 3)]
        boxes = [
            {
                "id": k,
                "image_id": image["id"],
                "category_id": CATEGORIES[k % 3]["id"],
                "bbox": [1, 1, 4, 3],
                "area": 12,
                "iscrowd": 0,
            }
            for k, image in enumerate(images)
        ]
        content = {"images": images, "annotations": boxes, "categories": CATEGORIES}
        archives["annotations_trainval2017.zip"][f"annotations/instances_{split}.json"] = json.dumps(content).encode()
        archives[f"{split}.zip"] = {f"{split}/{image['file_name']}": jpeg(20 * image["id"]) for image in images}
    return archives


@pytest.mark.parametrize("unpacked", [(), ("val2017.zip",), ("annotations_trainval2017.zip", "train2017.zip"), None])
def test_coco_is_read_from_its_zips_unpacked_or_mixed(tmp_path, unpacked):
    root = tmp_path / "data" / "coco"
    root.mkdir(parents=True)
    for name, members in coco_files().items():
        if unpacked is None or name in unpacked:
            write_folder(root, members)
        else:
            write_zip(root / name, members)
    before = sorted(path.name for path in root.rglob("*"))
    for arguments in (("coco", "val", tmp_path / "data"), ("coco", "val2017", root), (str(root), "val2017", None)):
        name, split, place = arguments
        data = load_detection(name, split, root=place)
        assert data.spec.classes == ("person", "stop sign", "toothbrush")
        assert [row["image_id"] for row in data.dataset] == [5, 6, 7]
        assert [row["objects"][0]["category"] for row in data.dataset] == [0, 1, 2]
        assert [int(np.asarray(row["image"])[0, 0, 0]) for row in data.dataset] == [100, 120, 140]
    assert [row["image_id"] for row in load_detection("coco", "train2017", root=root).dataset] == [1, 2, 3]
    assert sorted(path.name for path in root.rglob("*")) == before, "nothing is unpacked"


def test_error_for_missing_coco_says_where_to_get_it(tmp_path):
    with pytest.raises(InputError, match=r"COCO is not in .*cocodataset.org.*train2017.zip.*DENSESEG_DATA_ROOT"):
        load_detection("coco", "val2017", root=tmp_path)
    with pytest.raises(InputError, match="does not exist. Fix data_root"):
        load_detection("coco", "val2017", root=tmp_path / "none")


def test_data_check_accepts_coco_by_name(tmp_path, capsys, monkeypatch):
    for name, members in coco_files().items():
        write_zip(tmp_path / name, members)
    words = ["data", "check", "coco", "--split", "val2017", "--task", "object-detection"]
    assert main([*words, "--data_root", str(tmp_path)]) == 0
    monkeypatch.setenv("DENSESEG_DATA_ROOT", str(tmp_path))
    assert main(words) == 0 and "3 images, no faults" in capsys.readouterr().out


SHADES = {synset: 10 * label % 250 for synset, (label, _) in SYNSETS.items()}
TRAIN = {f"{synset}_{number}.JPEG": jpeg(shade) for synset, shade in SHADES.items() for number in (7, 31)}
VAL = {f"ILSVRC2012_val_{number:08d}.JPEG": jpeg(number) for number in (1, 2, 3, 4)}
VAL_SYNSETS = ["n15075141", "n01440764", "n02012849", "n01440764"]


def synset_of(name):
    return name.partition("_")[0]


def devkit():
    """The ids of the devkit are not in the order of the synsets."""
    ids = {"n15075141": 1, "n01440764": 2, "n02012849": 3}
    kind = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)]
    synsets = np.array([(float(number), synset, "words") for synset, number in ids.items()], dtype=kind).reshape(-1, 1)
    meta = io.BytesIO()
    matlab.savemat(meta, {"synsets": synsets})
    ground_truth = "".join(f"{ids[synset]}\n" for synset in VAL_SYNSETS).encode()
    above = "ILSVRC2012_devkit_t12/data"
    return {f"{above}/meta.mat": meta.getvalue(), f"{above}/ILSVRC2012_validation_ground_truth.txt": ground_truth}


def official_tars(root):
    inner = {f"{key}.tar": tar_of({name: TRAIN[name] for name in TRAIN if synset_of(name) == key}) for key in SYNSETS}
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of(VAL))
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_of(devkit(), "w:gz"))


def kaggle():
    above = "ILSVRC/Data/CLS-LOC"
    files = {f"{above}/train/{synset_of(name)}/{name}": content for name, content in TRAIN.items()}
    files |= {f"{above}/val/{name}": content for name, content in VAL.items()}
    rows = [
        f"{name.removesuffix('.JPEG')},{synset} 1 2 3 4 {synset} 5 6 7 8"
        for name, synset in zip(VAL, VAL_SYNSETS, strict=True)
    ]
    files["LOC_val_solution.csv"] = "\n".join(["ImageId,PredictionString", *reversed(rows)]).encode()
    files["LOC_synset_mapping.txt"] = b"n01440764 tench, Tinca tinca\n"
    return files


def sorted_folders():
    files = {f"train/{synset_of(name)}/{name}": content for name, content in TRAIN.items()}
    return files | {f"val/{synset}/{name}": VAL[name] for name, synset in zip(VAL, VAL_SYNSETS, strict=True)}


def unpacked_devkit(root):
    official_tars(root)
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    write_folder(root, devkit())


def zip_of_folders(root):
    write_zip(root / "imagenet.zip", {f"imagenet/{name}": content for name, content in sorted_folders().items()})


def two_zips(root):
    for split in ("train", "val"):
        files = {name: content for name, content in sorted_folders().items() if name.startswith(split)}
        write_zip(root / f"{split}.zip", files)


LAYOUTS = {
    "official tars": official_tars,
    "unpacked devkit": unpacked_devkit,
    "kaggle folder": lambda root: write_folder(root, kaggle()),
    "kaggle zip": lambda root: write_zip(root / "imagenet-object-localization-challenge.zip", kaggle()),
    "folders": lambda root: write_folder(root, sorted_folders()),
    "zip of folders": zip_of_folders,
    "two zips": two_zips,
}


def labels_and_shades(data):
    return {row["id"]: (row["label"], int(np.asarray(row["image"])[0, 0, 0])) for row in data.dataset}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_imagenet_is_read_from_every_layout(tmp_path, layout):
    LAYOUTS[layout](tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    train, val = (load_classification("imagenet", split, root=tmp_path) for split in ("train", "validation"))
    assert train.spec.num_labels == 1000
    for label, name in SYNSETS.values():
        assert name is None or train.spec.classes[label] == name
    expected = {
        f"{synset}/{synset}_{number}": (SYNSETS[synset][0], shade)
        for synset, shade in SHADES.items()
        for number in (7, 31)
    }
    assert labels_and_shades(train) == expected
    assert labels_and_shades(val) == {
        f"{synset}/ILSVRC2012_val_{k:08d}": (SYNSETS[synset][0], k) for k, synset in enumerate(VAL_SYNSETS, 1)
    }
    assert sorted(path.name for path in tmp_path.rglob("*")) == before, "nothing is unpacked"


def test_validation_images_without_labels_are_rejected_with_the_fix(tmp_path):
    official_tars(tmp_path)
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert len(load_classification("imagenet", "train", root=tmp_path).dataset) == len(TRAIN)
    with pytest.raises(InputError, match=r"labels of the validation images are missing. Add ILSVRC2012_devkit_t12"):
        load_classification("imagenet", "val", root=tmp_path)


def test_error_for_missing_imagenet_says_where_to_get_it(tmp_path):
    with pytest.raises(InputError, match=r"ImageNet-1K is not in .*image-net.org.*ILSVRC2012_img_train.tar"):
        load_classification("imagenet", "val", root=tmp_path)


def test_the_official_folder_is_recognized_by_its_path_too(tmp_path):
    official_tars(tmp_path)
    assert load_classification(tmp_path, "val").spec.num_labels == 1000


def test_a_folder_of_other_classes_is_not_taken_for_imagenet(tmp_path):
    write_folder(tmp_path, {"train/cat/a.jpg": jpeg(1), "train/dog/b.jpg": jpeg(2)})
    write_zip(tmp_path / "train.zip", {"train/cat/a.jpg": jpeg(1)})
    assert load_classification(tmp_path, "train").spec.classes == ("cat", "dog")


def test_synsets_outside_the_1000_are_rejected(tmp_path):
    write_folder(tmp_path, {"train/n00000001/n00000001_1.JPEG": jpeg(1)})
    with pytest.raises(InputError, match="belongs to n00000001, which is not one of the 1000 of ImageNet-1K"):
        load_classification("imagenet", "train", root=tmp_path)


def v2_files():
    """Folder names are the ids of ImageNet's classes; two of a class, and the tenth after the second."""
    above = "imagenetv2-matched-frequency-format-val"
    return {f"{above}/{label}/{shade:040x}.jpeg": jpeg(shade) for shade, label in ((1, 134), (2, 10), (3, 2), (4, 10))}


@pytest.mark.parametrize("layout", ["archive", "folder", "given by its path"])
def test_imagenet_v2_has_the_class_ids_of_imagenet(tmp_path, layout):
    if layout == "folder":
        write_folder(tmp_path, v2_files())
    else:
        (tmp_path / "imagenetv2-matched-frequency.tar.gz").write_bytes(tar_of(v2_files(), "w:gz"))
    path = tmp_path / "imagenetv2-matched-frequency.tar.gz"
    given = (
        {"name_or_path": path} if layout == "given by its path" else {"name_or_path": "imagenet-v2", "root": tmp_path}
    )
    data = load_classification(**given, split="val")
    assert sorted(labels_and_shades(data).values()) == [(2, 3), (10, 2), (10, 4), (134, 1)]
    assert data.spec.num_labels == 1000 and data.spec.classes[134] == SYNSETS["n02012849"][1]
    with pytest.raises(InputError, match="no split 'train'; available: val"):
        load_classification(**given, split="train")


def test_error_for_missing_imagenet_v2_says_where_to_get_it(tmp_path):
    with pytest.raises(InputError, match=r"ImageNet-V2 is not in .*modestyachts.*matched-frequency.tar.gz"):
        load_classification("imagenet-v2", "val", root=tmp_path)
