"""Exports of annotation tools: one scene gives the same label maps in every format, and nothing is lost unsaid."""

import numpy as np
import pytest

from export_writers import CLASSES, SCENES, WRITERS, id_map
from hf_denseseg.cli import main
from hf_denseseg.data.segmentation import load_segmentation


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_label_maps(tmp_path, name):
    write, holes = WRITERS[name]
    write(tmp_path, SCENES)
    data = load_segmentation(tmp_path, "train")
    assert data.spec.classes == ("background", *CLASSES)
    rows = {row["id"].partition("-")[2] or row["id"]: row for row in data.dataset}  # Label Studio renames uploads
    assert set(rows) == set(SCENES)
    for key, things in SCENES.items():
        assert np.array_equal(rows[key]["label"], id_map(things, holes)), key


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_checked_by_its_folder_alone(tmp_path, capsys, name):
    WRITERS[name][0](tmp_path, SCENES)
    assert main(["data", "check", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "2 pairs, no faults." in printed
