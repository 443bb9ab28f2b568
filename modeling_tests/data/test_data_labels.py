"""The label specification: encoding, decoding, reading files, and errors in them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_denseseg.data.labels import LabelSpec, color_wheel
from hf_denseseg.errors import InputError

COLORS = LabelSpec.from_dict(
    {"name": "c", "classes": ["road", "car"], "colors": {"road": [1, 2, 3], "car": [200, 0, 9], "void": [0, 0, 0]}}
)


@st.composite
def specs(draw):
    count = draw(st.integers(1, 20))
    raws = draw(st.lists(st.integers(0, 400), min_size=count, max_size=count + 5, unique=True))
    trains = list(range(count)) + [draw(st.integers(0, count - 1)) for _ in raws[count:]]
    ignored = draw(st.lists(st.integers(401, 600), max_size=3, unique=True))
    return LabelSpec(
        "any", tuple(f"class {k}" for k in range(count)), (), dict(zip(raws, trains, strict=True)), tuple(ignored)
    )


@settings(max_examples=40, deadline=None)
@given(specs(), st.randoms(use_true_random=False))
def test_encode_uses_the_table_and_decode_is_its_inverse(spec, random):
    known = [*spec.raw_to_train, *spec.raw_void]
    raw = np.array([random.choice(known) for _ in range(30)], dtype=np.uint16).reshape(5, 6)
    expected = [[spec.raw_to_train.get(int(value), 255) for value in row] for row in raw]
    train = spec.encode(raw)
    assert train.dtype == np.uint8
    assert train.tolist() == expected
    if spec.raw_void:
        assert (spec.encode(spec.decode(train)) == train).all()


@settings(max_examples=20, deadline=None)
@given(specs())
def test_a_specification_round_trips_through_json(spec):
    assert LabelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_8_bit_and_16_bit_maps_encode_alike():
    spec = LabelSpec("s", ("a", "b"), raw_to_train={3: 0, 7: 1}, raw_void=(0,))
    raw = np.array([[3, 7], [0, 255]], dtype=np.uint8)
    assert spec.encode(raw).tolist() == [[0, 1], [255, 255]]
    assert (spec.encode(raw.astype(np.uint16)) == spec.encode(raw)).all()
    spec.encode(raw)[0, 0] = 1  # the result is writable


def test_unknown_ids_are_reported_with_their_fraction_and_the_known_ids():
    spec = LabelSpec("s", ("a", "b"))
    with pytest.raises(InputError, match=r"Raw ids 7, 9 \(75.0% .* 0-1, 255.*raw_to_train"):
        spec.encode(np.array([[7, 9], [9, 1]], dtype=np.uint8))


def test_classes_alone_get_ids_from_zero_and_255_is_ignored():
    spec = LabelSpec.from_dict({"classes": ["a", "b", "c"]})
    assert (spec.raw_to_train, spec.raw_void, spec.num_labels) == ({0: 0, 1: 1, 2: 2}, (255,), 3)
    assert spec.id2label == {0: "a", 1: "b", 2: "c"} and spec.label2id["c"] == 2
    assert len(set(spec.palette)) == 3


def test_an_ignored_id_among_the_classes_shifts_the_ids_after_it():
    assert LabelSpec.from_dict({"classes": ["wall", "sky"], "raw_void_id": 0}).raw_to_train == {1: 0, 2: 1}


def test_id2label_tables_are_read(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text('{"4": "car", "2": "road"}')
    spec = LabelSpec.from_file(path)
    assert spec.classes == ("road", "car") and spec.raw_to_train == {2: 0, 4: 1}


def test_yaml_file_with_palette_and_colors(tmp_path):
    path = tmp_path / "labels.yaml"
    path.write_text("classes: [road, car]\npalette: [[1, 2, 3], [4, 5, 6]]\ncolors: {car: [9, 9, 9]}\nlicence: CC0\n")
    spec = LabelSpec.from_file(path)
    assert spec.palette == ((1, 2, 3), (4, 5, 6)) and spec.color_to_raw == {(9, 9, 9): 1} and spec.license == "CC0"


def test_color_masks():
    rgb = np.array([[[1, 2, 3], [200, 0, 9]], [[0, 0, 0], [1, 2, 3]]], dtype=np.uint8)
    assert COLORS.encode_colors(rgb).tolist() == [[0, 1], [255, 0]]
    with pytest.raises(InputError, match=r"\[\[1, 2, 4\]\].*25.0%"):
        COLORS.encode_colors(np.array([[[1, 2, 4], [200, 0, 9]], [[0, 0, 0], [1, 2, 3]]], dtype=np.uint8))


def test_the_generated_palette_is_that_of_voc():
    """The first colors after background in the color map of the PASCAL VOC devkit."""
    assert color_wheel(4) == ((128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert len(set(color_wheel(254))) == 254
    assert len(set(color_wheel(1000))) == 1000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classes": ["a"], "pallete": []}, "did you mean 'palette'"),
        ({"classes": ["a"], "zebra": 1}, "Known keys: categories, citation, classes"),
        ({"palette": [[0, 0, 0]]}, "needs `classes`"),
        ({"classes": ["a", "a"]}, "duplicate"),
        ({"classes": []}, "0 classes"),
        ({"classes": ["a"], "palette": [[0, 0, 0], [1, 1, 1]]}, "2 colors"),
        ({"classes": ["a"], "palette": [[0, 0, 300]]}, "three numbers in 0..255"),
        ({"classes": ["a"], "raw_to_train": {"1": 4}}, "outside 0..0"),
        ({"classes": ["a"], "raw_to_train": {"1": 0}, "raw_void": [1]}, "both in `raw_void` and in `raw_to_train`"),
        ({"classes": ["a"], "raw_to_train": {"99999": 0}}, "outside 0..65535"),
        ({"classes": ["a"], "colors": {"b": [0, 0, 0]}}, "names \\['b'\\]"),
        ({"classes": ["a"], "raw_void": {"x": 1}}, "wrong type"),
    ],
)
def test_invalid_specifications_are_rejected_with_the_reason(values, message):
    with pytest.raises(InputError, match=message):
        LabelSpec.from_dict(values)


@pytest.mark.parametrize("text", ["{", "- [", "just words"])
def test_errors_name_the_unreadable_file(tmp_path, text):
    path = tmp_path / "classes.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="classes.yaml"):
        LabelSpec.from_file(path)
    with pytest.raises(InputError, match="missing.json cannot be read"):
        LabelSpec.from_file(tmp_path / "missing.json")


def test_categories_round_trip_through_json_and_must_be_classes():
    values = {"classes": ["road", "sidewalk", "car"], "categories": {"flat": ["road", "sidewalk"], "vehicle": ["car"]}}
    spec = LabelSpec.from_dict(values)
    assert spec.categories == {"flat": ("road", "sidewalk"), "vehicle": ("car",)}
    assert LabelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    for wrong in ({"flat": ["rood"]}, {"flat": ["road"], "vehicle": ["road", "car"]}):
        with pytest.raises(InputError, match="`categories` names"):
            LabelSpec.from_dict({**values, "categories": wrong})


@pytest.mark.parametrize(
    ("count", "ignored", "dtype"), [(254, 255, np.uint8), (255, 65535, np.uint16), (847, 65535, np.uint16)]
)
def test_the_ignored_id_and_the_type_follow_from_the_number_of_classes(count, ignored, dtype):
    spec = LabelSpec("s", tuple(f"class {k}" for k in range(count)))
    assert (spec.ignore_index, spec.dtype, spec.raw_void) == (ignored, dtype, (ignored,))
    raw = np.array([[0, 253, count - 1, ignored]], np.uint16)
    assert spec.encode(raw).dtype == dtype and np.array_equal(spec.encode(raw), raw)
    assert np.array_equal(spec.decode(spec.encode(raw)), raw)
    assert np.array_equal(spec.encode(np.array([[253, 0]], np.uint8)), [[253, 0]])
    with pytest.raises(InputError, match="not in the label specification"):
        spec.encode(np.array([[count + 2]], np.uint16))
    again = LabelSpec.from_dict(spec.to_dict())
    assert again == spec and np.array_equal(again.table, spec.table)


def test_more_than_254_classes_may_have_any_raw_ids_and_colors():
    names = [f"class {k}" for k in range(300)]
    spec = LabelSpec.from_dict({"classes": names, "raw_void": 255})  # explicitly
    assert spec.encode(np.array([[254, 255, 256, 300, 65535]])).tolist() == [[254, 65535, 255, 299, 65535]]
    shifted = LabelSpec.from_dict({"classes": names, "raw_void": 0})
    assert shifted.encode(np.array([[0, 1, 255, 256, 300]])).tolist() == [[65535, 0, 254, 255, 299]]
    colors = {name: list(color) for name, color in zip(names, color_wheel(300), strict=True)}
    colored = LabelSpec.from_dict({"classes": names, "colors": colors | {"void": [0, 0, 0]}})
    shown = np.array([[colors["class 255"], colors["class 299"], [0, 0, 0]]], np.uint8)
    assert colored.encode_colors(shown).tolist() == [[255, 299, 65535]]


def test_the_most_classes_of_a_16_bit_map():
    spec = LabelSpec("s", tuple(map(str, range(65534))))
    assert spec.encode(np.array([[65533, 65535]])).tolist() == [[65533, 65535]]
    with pytest.raises(InputError, match="65535 classes; between 1 and 65534 are supported"):
        LabelSpec("s", tuple(map(str, range(65535))))
