"""One scene as annotation tools export it, written from the public definition of each format."""

import base64
import io
import itertools
import json
import zlib
from functools import partial
from typing import NamedTuple
from urllib.parse import quote

import datasets
import numpy as np
from datasets import Dataset, Features
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


def labelme(folder, scenes, shapes_of=None):
    """One JSON file beside each image; polygons, of which each part is a shape."""
    for name, things in scenes.items():
        write_image(folder / f"{name}.png", name)
        polygons = [
            {"label": thing.label, "points": part, "shape_type": "polygon", "group_id": number, "flags": {}}
            for number, thing in enumerate(things)
            for part in thing.parts
        ]
        content = {"version": "5.5.0", "flags": {}, "shapes": shapes_of(things) if shapes_of else polygons}
        content |= {"imagePath": f"{name}.png", "imageData": "iVBORw0=", "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
        dump(folder / f"{name}.json", content)


def cropped(mask):
    """Bounding box (top, left, bottom, right), exclusive, and the mask inside it."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left, bottom, right = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
    return (int(top), int(left), int(bottom), int(right)), mask[top:bottom, left:right]


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def labelme_masks(folder, scenes):
    """Shapes of the type mask: a PNG of the bounding box, whose last row and column are those of the second point."""

    def shapes(things):
        found = []
        for thing in things:
            (top, left, bottom, right), mask = cropped(mask_of(thing))
            points, text = [[left, top], [right - 1, bottom - 1]], base64.b64encode(png(mask)).decode()
            found.append({"label": thing.label, "shape_type": "mask", "points": points, "mask": text})
        return found

    labelme(folder, scenes, shapes)


def yolo(folder, scenes):
    """data.yaml, images/ and labels/ with fractions of the image size; the empty image has no text file."""
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(CLASSES))
    (folder / "labels/train").mkdir(parents=True)
    (folder / "data.yaml").write_text(f"path: /elsewhere/data\ntrain: images/train\nnames:\n{names}", encoding="utf-8")
    for name, things in scenes.items():
        write_image(folder / "images/train" / f"{name}.png", name)
        parts = [(CLASSES.index(thing.label), part) for thing in things for part in thing.parts]
        lines = [f"{k} " + " ".join(f"{x / SIZE[1]:.8f} {y / SIZE[0]:.8f}" for x, y in part) for k, part in parts]
        if lines:
            (folder / "labels/train" / f"{name}.txt").write_text("\n".join(lines) + "\n")


def supervisely_project(folder, scenes, things_as):
    """meta.json, ds/img and ds/ann/<image>.json; `things_as` makes the geometries of an object."""
    dump(folder / "meta.json", {"classes": [{"title": name, "shape": "any", "color": "#0F8A12"} for name in CLASSES]})
    for name, things in scenes.items():
        write_image(folder / "ds/img" / f"{name}.png", name)
        objects = [{"classTitle": thing.label, **each} for thing in things for each in things_as(thing)]
        size = {"height": SIZE[0], "width": SIZE[1]}
        dump(folder / "ds/ann" / f"{name}.png.json", {"size": size, "tags": [], "objects": objects})


def supervisely_polygons(folder, scenes):
    def geometries(thing):
        for part in thing.parts:
            yield {"geometryType": "polygon", "points": {"exterior": part, "interior": thing.holes}}

    supervisely_project(folder, scenes, geometries)


def supervisely_bitmaps(folder, scenes):
    def geometries(thing):
        (top, left, _, _), mask = cropped(mask_of(thing))
        data = base64.b64encode(zlib.compress(png(mask))).decode()
        yield {"geometryType": "bitmap", "bitmap": {"origin": [left, top], "data": data}}

    supervisely_project(folder, scenes, geometries)


def brush(mask):
    """Mask -> Label Studio's run lengths: bits of rle-pack over the four channels of every pixel."""
    values = np.repeat(mask.ravel() * 255, 4).tolist()
    bits = f"{len(values):032b}{8 - 1:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    for value, group in itertools.groupby(values):
        left = len(list(group))
        while left > 3:
            length = min(left, 2**16)
            bits += f"1{3:02b}{length - 1:016b}{value:08b}"
            left -= length
        if left:  # a run that is not repeated
            bits += f"0{0:02b}{left - 1:03b}" + f"{value:08b}" * left
    bits += "0" * (-len(bits) % 8)
    return [int(bits[place : place + 8], 2) for place in range(0, len(bits), 8)]


def label_studio_json(folder, scenes, regions_of):
    """export.json and uploaded images, whose names begin with eight digits."""
    tasks = []
    for number, (name, things) in enumerate(scenes.items()):
        write_image(folder / "images" / f"0123abc{number}-{name}.png", name)
        result = [
            {"id": f"r{k}", "type": kind, "original_width": SIZE[1], "original_height": SIZE[0], "image_rotation": 0}
            | {"from_name": "label", "to_name": "image", "value": {**value, kind: [thing.label]}}
            for k, thing in enumerate(things)
            for kind, value in regions_of(thing)
        ]
        data = {"image": f"/data/upload/1/0123abc{number}-{quote(name)}.png"}
        annotations = [{"id": 7 + number, "was_cancelled": False, "result": result}]
        tasks.append({"id": number, "annotations": annotations, "data": data, "project": 1})
    dump(folder / "project-1.json", tasks)


def label_studio_polygons(folder, scenes):
    def regions(thing):
        for part in thing.parts:
            points = [[100 * x / SIZE[1], 100 * y / SIZE[0]] for x, y in part]
            yield "polygonlabels", {"points": points, "closed": True}

    label_studio_json(folder, scenes, regions)


def label_studio_brushes(folder, scenes):
    def regions(thing):
        yield "brushlabels", {"format": "rle", "rle": brush(mask_of(thing))}

    label_studio_json(folder, scenes, regions)


def label_studio_pngs(folder, scenes):
    """One PNG per annotation and class, and the JSON export, which names the images."""
    label_studio_brushes(folder, scenes)
    for task, things in enumerate(scenes.values()):
        for label in CLASSES:
            masks = [mask_of(thing) for thing in things if thing.label == label]
            if masks:
                file = f"task-{task}-annotation-{7 + task}-by-a-b@c.org-label-{label}-0.png"
                (folder / file).write_bytes(png(np.any(masks, 0).astype(np.uint8) * 255))


COLORS = {"background": (0, 0, 0), "car": (128, 0, 0), "tree": (0, 128, 0), "зебра": (250, 50, 83)}


def cvat(folder, scenes):
    """Segmentation mask 1.1: color masks in Pascal VOC's folders, and labelmap.txt."""
    lines = [f"{name}:{','.join(map(str, color))}::" for name, color in COLORS.items()]
    (folder / "ImageSets/Segmentation").mkdir(parents=True)
    (folder / "SegmentationClass").mkdir()
    (folder / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *lines, ""]), encoding="utf-8")
    (folder / "ImageSets/Segmentation/default.txt").write_text(
        "".join(f"{name}\n" for name in scenes), encoding="utf-8"
    )
    for name, things in scenes.items():
        write_image(folder / "JPEGImages" / f"{name}.png", name)
        colors = np.array(list(COLORS.values()), np.uint8)
        Image.fromarray(colors[id_map(things)]).save(folder / "SegmentationClass" / f"{name}.png")


def cvat_palette(folder, scenes):
    """The same with palette images, whose indices are not the order of labelmap.txt."""
    cvat(folder, scenes)
    for name, things in scenes.items():
        image = Image.fromarray(3 - id_map(things))
        image.putpalette([channel for color in reversed(COLORS.values()) for channel in color])
        image.save(folder / "SegmentationClass" / f"{name}.png")


def roboflow_masks(folder, scenes):
    """png-mask-semantic: _classes.csv, x.png and x_mask.png in the folder of the split."""
    rows = "".join(f"{number}, {name}\n" for number, name in enumerate(("background", *CLASSES)))
    for name, things in scenes.items():
        write_image(folder / "train" / f"{name}.png", name)
        Image.fromarray(id_map(things)).save(folder / "train" / f"{name}_mask.png")
    (folder / "train/_classes.csv").write_text(f"Pixel Value, Class\n{rows}", encoding="utf-8")


# Name -> function that writes the scene, and whether the format can say holes.
WRITERS = {
    "coco run lengths": (coco_official, True),
    "coco polygons": (coco_flat, False),
    "roboflow coco": (roboflow_coco, False),
    "labelme polygons": (labelme, False),
    "labelme masks": (labelme_masks, True),
    "yolo": (yolo, False),
    "supervisely polygons": (supervisely_polygons, True),
    "supervisely bitmaps": (supervisely_bitmaps, True),
    "label studio polygons": (label_studio_polygons, False),
    "label studio brushes": (label_studio_brushes, True),
    "label studio pngs": (label_studio_pngs, True),
    "cvat": (cvat, True),
    "cvat palette": (cvat_palette, True),
    "roboflow masks": (roboflow_masks, True),
}


def pairs(folder, scenes, images="images", labels="masks", label="{}.png", write=None):
    """Images and label maps of ids in two folders, or in one, and classes.json, since ids have no names."""
    dump(folder / "classes.json", ["background", *CLASSES])
    for name, things in scenes.items():
        write_image(folder / images / f"{name}.png", name)
        path = folder / labels / label.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        (write or (lambda path, ids: Image.fromarray(ids).save(path)))(path, id_map(things))


def saved_by_datasets(folder, scenes):
    """`Dataset.save_to_disk`."""
    ids = np.stack([id_map(things) for things in scenes.values()])
    images = [{"bytes": png(np.zeros((*SIZE, 3), np.uint8)), "path": None} for _ in scenes]
    labels = [{"bytes": png(each), "path": None} for each in ids]
    features = Features({"image": datasets.Image(), "label": datasets.Image(), "id": datasets.Value("string")})
    Dataset.from_dict({"image": images, "label": labels, "id": list(scenes)}, features=features).save_to_disk(folder)
    dump(folder / "classes.json", ["background", *CLASSES])


# Layouts whose label maps hold ids, likewise.
LAYOUTS = {
    "img_dir and ann_dir": partial(pairs, images="img_dir/train", labels="ann_dir/train"),
    "images and masks": pairs,
    "suffix beside": partial(pairs, images="", labels="", label="{}_mask.png"),
    "suffix in folders": partial(pairs, images="train/images", labels="train/masks", label="{}-mask.png"),
    "arrays": partial(pairs, label="{}.npy", write=np.save),
    "save_to_disk": saved_by_datasets,
}
WRITERS |= {name: (write, True) for name, write in LAYOUTS.items()}
