"""One scene as annotation tools export it, written from the public definition of each format."""

import json
from typing import NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco

SIZE = (40, 56)  # (height, width)
CLASSES = ("car", "tree", "зебра")


class Thing(NamedTuple):
    """An object: polygons of (x, y) points, and holes in them."""

    label: str
    parts: list
    holes: list = []


def box(left, top, right, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


SCENES = {
    "straße 1": [
        Thing("car", [box(4, 4, 24, 24)], [box(10, 10, 18, 18)]),
        Thing("tree", [[(30, 2), (50, 6), (36, 20)], box(26, 24, 34, 38)]),
        Thing("car", [[(34, 24), (48, 24), (52, 30), (34, 38)]]),  # touches the tree
        Thing("зебра", [[(-6, 20), (12, 20), (12, 50), (-6, 50)]]),  # over the car, and out of the image
    ],
    "empty": [],
}


def rle(mask):
    """Mask -> COCO's compressed run lengths."""
    packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(SIZE), "counts": packed["counts"].decode()}


def flat(points):
    return [float(c) for point in points for c in point]


def mask_of(thing, holes=True):
    """Mask `SIZE` bool of an object, drawn by pycocotools."""
    mask = np.zeros(SIZE, bool)
    for part in thing.parts:
        mask |= coco.decode(coco.frPyObjects([flat(part)], *SIZE))[..., 0] > 0
    for hole in thing.holes if holes else ():
        mask &= coco.decode(coco.frPyObjects([flat(hole)], *SIZE))[..., 0] == 0
    return mask


def id_map(things, holes=True):
    """The label map that every format must give: 0 is the background, a later object is on top."""
    ids = np.zeros(SIZE, np.uint8)
    for thing in things:
        ids[mask_of(thing, holes)] = 1 + CLASSES.index(thing.label)
    return ids


def write_image(path, name):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(len(name)).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def dump(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def coco_json(scenes, encode, file_name="{}.png"):
    """Content of an annotation file; `encode` makes the segmentation of an object."""
    content = {
        "images": [
            {"id": number, "file_name": file_name.format(name), "height": SIZE[0], "width": SIZE[1]}
            for number, name in enumerate(scenes)
        ],
        "annotations": [],
        "categories": [{"id": 10 + k, "name": name, "supercategory": "thing"} for k, name in enumerate(CLASSES)],
    }
    for number, things in enumerate(scenes.values()):
        for thing in things:
            entry = {"id": len(content["annotations"]), "image_id": number, "iscrowd": 0}
            entry |= {"category_id": 10 + CLASSES.index(thing.label), "segmentation": encode(thing)}
            content["annotations"].append(entry)
    return content


def coco_official(folder, scenes):
    """annotations/instances_<split>.json and <split>/, with run lengths."""
    dump(folder / "annotations/instances_train.json", coco_json(scenes, lambda thing: rle(mask_of(thing))))
    for name in scenes:
        write_image(folder / "train" / f"{name}.png", name)


def coco_flat(folder, scenes):
    """annotations.json beside images/, with polygons, which have no holes."""
    dump(folder / "annotations.json", coco_json(scenes, lambda thing: [flat(part) for part in thing.parts]))
    for name in scenes:
        write_image(folder / "images" / f"{name}.png", name)


def roboflow_coco(folder, scenes):
    """<split>/_annotations.coco.json among the images, whose first category is the project."""
    content = coco_json(scenes, lambda thing: [flat(part) for part in thing.parts])
    for category in content["categories"]:
        category["supercategory"] = "things"
    content["categories"].insert(0, {"id": 0, "name": "things", "supercategory": "none"})
    dump(folder / "train/_annotations.coco.json", content)
    for name in scenes:
        write_image(folder / "train" / f"{name}.png", name)


# Name -> function that writes the scene, and whether the format can say holes.
WRITERS = {
    "coco run lengths": (coco_official, True),
    "coco polygons": (coco_flat, False),
    "roboflow coco": (roboflow_coco, False),
}
