"""A saved checkpoint carries what `trust_remote_code=True` needs; `model_tester` loads it without the package."""

import json

import pytest
import torch
from transformers import AutoVideoProcessor, pipeline

import hf_denseseg
import new_python
from hf_denseseg.errors import InputError
from hf_denseseg.models.auto.registration import families, family_classes
from hf_denseseg.models.auto.remote_code import file_of, modules_of, write_code
from processor_tester import random_image

LOAD = """
import sys
from transformers import AutoBackbone, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation
import transformers.dynamic_module_utils
assert "hf_denseseg" not in sys.modules
folder, transformers.dynamic_module_utils.HF_MODULES_CACHE = sys.argv[1:]
model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
print(type(model).__module__, type(processor).__name__, type(base).__name__)
"""

UNEPT = {"depths": [1, 1, 1, 1], "base_channels": 4, "stem_channels": 8, "hidden_size": 16, "num_attention_heads": 2}
UNEPT |= {"num_points": 3, "intermediate_size": 24, "spatial_channels": [8, 8], "head_channels": 8, "num_labels": 3}
TWO = """
import sys
import torch
sys.modules["hf_denseseg"] = sys.modules["kernels"] = None
import transformers, transformers.dynamic_module_utils
transformers.dynamic_module_utils.HF_MODULES_CACHE = sys.argv[1]
models = [transformers.AutoModelForSemanticSegmentation.from_pretrained(each, trust_remote_code=True)
          for each in sys.argv[2:]]
assert type(models[0]) is not type(models[1])
for model in models:
    logits = model(torch.zeros(1, 3, 64, 64)).logits
    logits.sum().backward()
"""


def test_checkpoint_loads_in_a_process_that_did_not_import_the_package(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "checkpoint"
    fields = {"spatial_hidden_sizes": [8, 16, 32], "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 6}
    hf_denseseg.create_model("dsct-tiny-sac", **fields).save_pretrained(folder)
    hf_denseseg.DsctImageProcessor().save_pretrained(folder)
    write_code(folder)
    done = new_python.run(["-c", LOAD, folder, tmp_path / "modules"])
    assert done.returncode == 0, done.stderr[-2000:]
    expected = "hf_denseseg.models.dsct.modeling_dsct DsctImageProcessor DsctModel"
    assert done.stdout.strip().splitlines()[-1] == expected


def test_pipelines_never_ask_to_run_code_once_the_package_is_imported(tmp_path, monkeypatch):
    """The file of the image processor names code, which pipelines took for that of a video processor."""
    fields = {"spatial_hidden_sizes": [8, 16, 32], "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 6}
    hf_denseseg.create_model("dsct-tiny-sac", **fields).save_pretrained(tmp_path)
    hf_denseseg.DsctImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    write_code(tmp_path)
    asked = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "n")
    for task in ("image-segmentation", "image-feature-extraction"):
        assert pipeline(task, model=str(tmp_path), device="cpu")(random_image())
    assert not asked
    with pytest.raises(InputError, match="no video processor. Use AutoImageProcessor"):
        AutoVideoProcessor.from_pretrained(tmp_path)


def test_entry_module_names_every_class_of_the_family(tmp_path):
    hf_denseseg.create_config("dsct-tiny-sac").save_pretrained(tmp_path)
    write_code(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "modeling_hf_denseseg.DsctConfig"
    assert auto_map["AutoModelForSemanticSegmentation"] == "modeling_hf_denseseg.DsctForSemanticSegmentation"
    assert {"AutoModel", "AutoBackbone", "AutoModelForImageClassification"} <= auto_map.keys()
    names: dict = {}
    exec((tmp_path / "modeling_hf_denseseg.py").read_text(), names)
    assert all(reference.split(".")[1] in names for reference in auto_map.values())


def test_entry_module_of_a_checkpoint_names_the_class_it_is_of(tmp_path):
    """Mask R-CNN is an object detector too, so the Auto class may load two classes of this family."""
    hf_denseseg.create_config("hlg-maskrcnn-tiny").save_pretrained(tmp_path)
    write_code(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForObjectDetection"] == "modeling_hf_denseseg.HlgForInstanceSegmentation"
    assert auto_map["AutoModelForSemanticSegmentation"] == "modeling_hf_denseseg.HlgForSemanticSegmentation"


def test_files_of_a_checkpoint_have_different_names():
    for family in families():
        modules = modules_of(each.__module__ for each in family_classes(family).values())
        assert len(set(map(file_of, modules))) == len(modules), family


def test_two_checkpoints_of_other_versions_of_the_code_work_in_one_process(tmp_path):
    """UN-EPT registers an operator, which the code of the second checkpoint registers again."""
    folders = [tmp_path / "first", tmp_path / "second"]
    config = hf_denseseg.create_config("unept-resnet50", **UNEPT)
    for folder in folders:
        hf_denseseg.UneptForSemanticSegmentation(config).save_pretrained(folder)
        write_code(folder)
    (folders[1] / "errors.py").write_text((folders[1] / "errors.py").read_text() + "\n# another version\n")
    done = new_python.run(["-c", TWO, tmp_path / "modules", *folders])
    assert done.returncode == 0, done.stderr[-3000:]
