"""`denseseg export`: what is written runs elsewhere and gives what the checkpoint gives, or nothing is written."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers.conv2d_same import Conv2dSame

import hf_denseseg
from hf_denseseg.cli import main
from hf_denseseg.errors import InputError
from hf_denseseg.inference.export import cost, engines, exported_model, exporting, int8, programs
from hf_denseseg.inference.export.byte_resize import ByteResize
from hf_denseseg.inference.export.formats import FORMATS
from hf_denseseg.inference.preprocessing import Preprocessing
from hf_denseseg.inference.segmentation import segment
from hf_denseseg.inference.settings import InferenceSettings
from hf_denseseg.models.auto.registration import create_image_processor
from tiny_models import TINY_SETR, save_decided_setr

ALONE = """
import sys
import numpy as np
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "hf_denseseg", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
image = np.load(sys.argv[2])
if sys.argv[1].endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    class_map = session.run(["class_map"], {"image": image})[0]
else:
    import openvino
    model = openvino.Core().compile_model(sys.argv[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    class_map = model({"image": image})["class_map"]
np.save(sys.argv[3], class_map)
"""


@pytest.fixture(scope="module", autouse=True)
def memory_of_no_process():
    """A new process for each of two measurements takes seconds; one test measures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "_peak_memory", lambda kind, words: 2**20)
        yield patch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_decided_setr(tmp_path_factory.mktemp("setr") / "model")


@pytest.fixture(scope="module")
def logits_export(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "onnx"
    words = ["--format", "onnx", "--dataset", "synthetic", "--eval_split", "val", "--max_eval_samples", "3"]
    assert main(["export", str(checkpoint), *words, "--output", str(folder), "--use_cpu"]) == 0
    return folder


@pytest.fixture(scope="module")
def class_map_export(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "onnx"
    assert main(["export", str(checkpoint), "--format", "onnx", "--with_argmax", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def openvino_export(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "openvino"
    words = ["--format", "openvino", "--with_argmax", "--output", str(folder)]
    assert main(["export", str(checkpoint), *words]) == 0
    return folder


def expected_map(checkpoint: Path, image: np.ndarray) -> np.ndarray:
    """Class map `(H, W)` of the checkpoint for an image `(3, H, W)` uint8, by the inference of the package."""
    model = hf_denseseg.SetrForSemanticSegmentation.from_pretrained(checkpoint).eval()
    preprocessing = Preprocessing.from_image_processor(hf_denseseg.SetrImageProcessor.from_pretrained(checkpoint))
    return segment(model, torch.from_numpy(image), InferenceSettings(), preprocessing).numpy()


@pytest.mark.parametrize("name", ["class_map_export", "openvino_export"])
def test_class_map_is_that_of_the_checkpoint_where_neither_torch_nor_this_package_can_be_imported(
    checkpoint, name, tmp_path, request
):
    folder = request.getfixturevalue(name)
    file = json.loads((folder / "export.json").read_text())["file"]
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 75, 61), dtype=np.uint8)
    np.save(tmp_path / "image.npy", images)
    words = [folder / file, tmp_path / "image.npy", tmp_path / "map.npy"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", ALONE, *map(str, words)], check=True, env=environment)
    found = np.load(tmp_path / "map.npy")
    assert found.dtype == np.uint8 and found.shape == (2, 75, 61)
    assert len(np.unique(found)) > 1
    expected = np.stack([expected_map(checkpoint, image) for image in images])
    assert (found == expected).mean() >= 0.9999


needs_avx = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"),
    reason="torch resizes bytes in another way on this processor",
)


@needs_avx
@pytest.mark.parametrize(("before", "after"), [((80, 100), (64, 80)), ((37, 50), (91, 70)), ((300, 31), (13, 310))])
def test_resize_in_whole_numbers_is_that_of_torch(before, after):
    images = torch.randint(0, 256, (2, 3, *before), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = F.interpolate(images, size=after, mode="bilinear", antialias=True)
    assert torch.equal(ByteResize(before, after)(images), expected)


@needs_avx
def test_class_map_of_a_checkpoint_that_resizes_images_is_that_of_the_package(checkpoint):
    """80 % of the size: many sums lie in the middle between two bytes, which floating point rounds either way."""
    model = hf_denseseg.SetrForSemanticSegmentation.from_pretrained(checkpoint).eval()
    preprocessing = Preprocessing.from_image_processor(hf_denseseg.SetrImageProcessor.from_pretrained(checkpoint))
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 80, 100), dtype=np.uint8))
    program = programs.ClassMap(model, preprocessing, 0.5, ByteResize((80, 100), (64, 80))).eval()
    with torch.no_grad():
        (found,) = program(image[None])
    expected = segment(model, image, InferenceSettings(base_size=(64, 80)), preprocessing)
    assert len(expected.unique()) > 1 and torch.equal(found[0].long(), expected.long())


def test_more_than_256_classes_are_written_as_uint16(tmp_path):
    """The last of 300 classes is chosen everywhere."""
    fields = {**TINY_SETR, "num_hidden_layers": 2, "auxiliary_layers": [0, 1], "num_labels": 300}
    model = hf_denseseg.create_model("setr-naive-deit-base", **fields).eval()
    with torch.no_grad():
        model.decode_head.classifier.bias[299] = 1e3
    program = programs.ClassMap(model, Preprocessing((0.0,) * 3, (1.0,) * 3), 0.5).eval()
    traced = exporting.trace(program, 3, None)
    image = torch.zeros(1, 3, 40, 56, dtype=torch.uint8)
    for name in ("torch", "onnx", "openvino"):
        path = tmp_path / FORMATS[name].file
        FORMATS[name].write(traced, path, program.input_name, program.output_names)
        (found,) = engines.ENGINES[name](path)(image)
        assert (found.dtype, found.shape) == (torch.uint16, (1, 40, 56)) and (found.int() == 299).all(), name


def test_an_export_for_one_size_says_so_to_images_of_another(logits_export):
    model = exported_model.open_export(logits_export, "semantic-segmentation")
    model.record["size"] = [64, 96]
    with pytest.raises(InputError, match="takes images of 64x96 pixels; after preprocessing they have 32x48"):
        model(torch.zeros(1, 3, 32, 48))


def test_record_says_what_it_is_and_how_it_was_verified(class_map_export):
    record = json.loads((class_map_export / "export.json").read_text())
    assert (record["input"], record["outputs"], record["with_argmax"]) == ("image", ["class_map"], True)
    sizes = {(row["height"], row["width"]) for row in record["verified"]}
    assert len(sizes) == 4 and any(height % 2 for height, _ in sizes) and all(h != w for h, w in sizes)
    assert all(row["agreement"] >= 0.9999 for row in record["verified"])
    assert {"README.md", "config.json", "model.onnx", "preprocessor_config.json"} == set(record["files"])
    assert record["model_bytes"] == record["files"]["model.onnx"]["bytes"]
    assert all(record["cost"][kind]["milliseconds"] > 0 for kind in ("model", "exported"))


def test_the_card_has_the_table(checkpoint, logits_export):
    text = (logits_export / "README.md").read_text()
    score = json.loads((logits_export / "export.json").read_text())["score"]
    assert f"| {100 * score['model']:.2f} | {100 * score['exported']:.2f} |" in text
    assert "| peak memory, MiB | 1 | 1 |" in text


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_of_its_own(checkpoint, class_map_export, memory_of_no_process):
    """The weights alone, once loaded, are less than either needs; both need less than this process."""
    memory_of_no_process.undo()
    words = [str(class_map_export), str(checkpoint), "semantic-segmentation", "onnx", "True", "256", "256"]
    for kind in ("model", "exported"):
        assert (checkpoint / "model.safetensors").stat().st_size < cost._peak_memory(kind, words) < 2**30


WINDOWS = ("--test_mode", "slide", "--test_crop_size", "64", "64", "--test_scales", "0.75", "1.0", "--test_flip")
DATA = ("--dataset", "synthetic", "--eval_split", "val", "--max_eval_samples", "3", "--use_cpu")


def scores_of(model: Path, output: Path, *words: str) -> dict:
    assert main(["evaluate", str(model), *DATA, *words, "--output_dir", str(output)]) == 0
    return json.loads((output / "results.json").read_text())


def test_an_export_is_evaluated_in_the_same_windows_scales_and_reports(checkpoint, logits_export, tmp_path):
    before = scores_of(checkpoint, tmp_path / "model", *WINDOWS)
    after = scores_of(logits_export, tmp_path / "exported", *WINDOWS)
    matrices = [np.array(each["scores"]["confusion_matrix"]) for each in (before, after)]
    assert np.abs(matrices[0] - matrices[1]).sum() <= 2e-4 * matrices[0].sum()
    assert before["protocol"] == after["protocol"] and before["parameters"] == after["parameters"] > 0
    assert (tmp_path / "exported" / "index.html").exists()


def test_scores_of_both_are_recorded(checkpoint, logits_export, tmp_path):
    score = json.loads((logits_export / "export.json").read_text())["score"]
    found = scores_of(checkpoint, tmp_path / "model")["scores"]
    assert score["model"] == pytest.approx(found["mean_iou"]) and score["exported"] == pytest.approx(
        found["mean_iou"], abs=5e-4
    )
    assert sorted(path.name for path in logits_export.parent.iterdir()) == ["onnx"]
    assert [row["class"] for row in score["classes"]] == [row["class"] for row in found["per_class"]]


def test_an_export_predicts_what_the_checkpoint_predicts(checkpoint, logits_export, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    masks = []
    for name, model in (("model", checkpoint), ("exported", logits_export)):
        words = ["--output_dir", str(tmp_path / name), "--test_crop_size", "64", "64", "--tile_above_pixels", "0"]
        assert main(["predict", str(model), str(tmp_path / "image.png"), *words, "--device", "cpu"]) == 0
        masks.append(np.asarray(Image.open(tmp_path / name / "masks" / "image.png")))
    assert (masks[0] == masks[1]).mean() >= 0.9999


def test_class_maps_are_scored_whole_and_refused_where_logits_are_needed(class_map_export, tmp_path, capsys):
    assert scores_of(class_map_export, tmp_path / "whole")["images"] == 3
    words = ["evaluate", str(class_map_export), *DATA, "--output_dir", str(tmp_path / "out")]
    for more in (WINDOWS, ("--calibration",)):
        assert main([*words, *more]) == 2
        assert "export without --with_argmax" in capsys.readouterr().err
    assert main(["predict", str(class_map_export), str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 2


def test_an_export_that_scores_otherwise_is_not_written(checkpoint, tmp_path, capsys, monkeypatch):
    """The converted model agrees on random images, and not on those of the dataset."""
    forward = exported_model.ExportedModel.forward

    def off(self, pixel_values):
        outputs = forward(self, pixel_values)
        outputs.logits[:, :, : outputs.logits.shape[2] // 2] *= -1
        return outputs

    monkeypatch.setattr(exported_model.ExportedModel, "forward", off)
    words = ["export", str(checkpoint), "--output", str(tmp_path / "exported"), *DATA]
    assert main(words) == 1
    assert "differ by more than 0.05 points; nothing was written" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_an_export_that_differs_is_not_written(checkpoint, tmp_path, capsys, monkeypatch):
    call = engines.TorchEngine.__call__
    monkeypatch.setattr(engines.TorchEngine, "__call__", lambda self, values: (call(self, values)[0] * 1.01,))
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "exported")]) == 1
    assert "is off by" in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.onnx", "config.json"])
def test_a_damaged_export_is_refused_by_its_checksum(logits_export, tmp_path, capsys, name):
    shutil.copytree(logits_export, tmp_path / "export")
    file = tmp_path / "export" / name
    content = bytearray(file.read_bytes())
    for change in ("edited", "cut"):
        content[len(content) // 2] ^= 1
        file.write_bytes(content if change == "edited" else content[:-100])
        words = ["evaluate", str(tmp_path / "export"), *DATA, "--output_dir", str(tmp_path / "out")]
        assert main(words) == 2
        assert name in (text := capsys.readouterr().err) and ("checksum" in text or "cut short" in text)


def test_a_missing_runtime_is_named_with_its_extra(checkpoint, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else find(name))
    words = ["export", str(checkpoint), "--format", "openvino", "--output", str(tmp_path / "exported")]
    assert main(words) == 2
    assert "pip install 'hf-denseseg[openvino]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--eval_split", "val"), "Give --dataset"),
        (("--dataset", "synthetic", "--learning_rate", "1.0"), "changes nothing in an export"),
        (("--size", "0", "5"), "height and width in pixels"),
    ],
)
def test_options_without_an_effect_are_refused(checkpoint, tmp_path, capsys, words, message):
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "exported"), *words]) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_exported_is_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exporting, "load_trained_model", None)
    for kind, message in (("ForInstanceSegmentation", "number of regions"), ("ForObjectDetection", "--size H W")):
        config = hf_denseseg.HlgConfig(architectures=[f"Hlg{kind}"])
        config.save_pretrained(tmp_path / kind)
        assert main(["export", str(tmp_path / kind), "--output", str(tmp_path / "exported")]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["openvino", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aoti", "executorch"))]
)
def test_other_formats_agree_with_the_checkpoint(checkpoint, tmp_path, name):
    if name == "executorch":
        pytest.importorskip("executorch")
    size = ["--size", "64", "80"] if name == "executorch" else []
    words = ["export", str(checkpoint), "--format", name, "--output", str(tmp_path / "exported"), *size]
    assert main([*words, *DATA] if name == "openvino" else words) == 0
    record = json.loads((tmp_path / "exported" / "export.json").read_text())
    assert all(row["agreement"] >= 0.9999 and row["error"] < 1e-4 for row in record["verified"])
    if name == "aoti":
        assert main(["evaluate", str(tmp_path / "exported"), *DATA]) == 2


CALIBRATION = ("--int8", "--calibration", "synthetic", "--calibration_images", "3", "--use_cpu")


@pytest.fixture(scope="module")
def int8_export(checkpoint, tmp_path_factory):
    """Random weights lose more than trained ones, whose loss is limited; here it is not."""
    folder = tmp_path_factory.mktemp("export") / "onnx"
    words = ["export", str(checkpoint), "--format", "onnx", "--output", str(folder), *CALIBRATION]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "MOST_LOST", 1.0)
        assert main(words) == 0
    return folder


def test_int8_weights_are_bytes_per_channel_and_logits_stay_close(int8_export, logits_export):
    graph = onnx.load(int8_export / "model.onnx").graph
    weights = [each for each in graph.initializer if each.data_type == onnx.TensorProto.INT8 and len(each.dims) == 4]
    scales = {each.name: each for each in graph.initializer}
    used = {node.input[0]: node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"}
    assert weights and all(list(scales[used[each.name]].dims) == [each.dims[0]] for each in weights)
    values = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    before, after = (engines.OnnxEngine(each / "model.onnx")(values)[0] for each in (logits_export, int8_export))
    assert 0 < float((before - after).std() / before.std()) < 0.2


def test_int8_record_and_scores_by_the_evaluator(int8_export, tmp_path):
    record = json.loads((int8_export / "export.json").read_text())
    assert record["int8"]["inputs"] == 3 and record["int8"]["kept"] == [] and record["int8"]["layers"] > 3
    assert scores_of(int8_export, tmp_path / "out")["images"] == 3
    assert f"{100 * record['int8']['agreement']:.2f} % on the calibration" in (int8_export / "README.md").read_text()


def test_layers_that_cost_most_stay_in_float(checkpoint, logits_export, tmp_path, monkeypatch):
    """The pass ranks every layer; twice as many stay in float each time, until little is lost."""
    shutil.copytree(logits_export, tmp_path / "export")
    losses = iter([0.0, 0.2, 0.2, 0.001])  # float32; all layers; all but one; all but two
    written = []
    write = int8.write_int8

    def noted(source, target, files, layers):
        written.append(list(layers))
        write(source, target, files, layers)

    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def score(model):
        model(images)
        return 0.8 - next(losses)

    def convert(path):
        shutil.copy(path, tmp_path / "int8.onnx")
        return engines.OnnxEngine(path)

    monkeypatch.setattr(int8, "write_int8", noted)
    facts = int8.quantize(tmp_path / "export", "semantic-segmentation", score, convert)
    every, alone, last = written[0], [each[0] for each in written if len(each) == 1], written[-1]
    assert alone == every and len(facts["kept"]) == 2 and not set(facts["kept"]) & set(last)
    assert len(last) == len(every) - 2
    before, after = (
        onnxruntime.InferenceSession(path).run(None, {"pixel_values": images.numpy()})[0].argmax(1)
        for path in (logits_export / "model.onnx", tmp_path / "int8.onnx")
    )
    assert facts["agreement"] == pytest.approx((before == after).mean()) and 0 < facts["agreement"] <= 1


def test_masks_of_minus_infinity_survive_int8(tmp_path):
    """Scores that are masked before a softmax: a range that reaches minus infinity would end what is beside it."""
    generator = np.random.default_rng(0)
    weights = [generator.standard_normal((8, 8)).astype(np.float32) for _ in range(2)]
    mask = np.where(np.arange(8) < 6, 0, -np.inf).astype(np.float32)
    nodes = [("MatMul", "x", "w0", "scores"), ("Add", "scores", "mask", "masked"), ("MatMul", "weights", "w1", "y")]
    nodes = [onnx.helper.make_node(kind, [a, b], [out], name=out) for kind, a, b, out in nodes]
    nodes.insert(2, onnx.helper.make_node("Softmax", ["masked"], ["weights"], name="weights"))
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [16, 8]) for name in "xy"]
    constants = zip(("w0", "w1", "mask"), (*weights, mask), strict=True)
    constants = [onnx.numpy_helper.from_array(values, name) for name, values in constants]
    graph = onnx.helper.make_graph(nodes, "attention", ends[:1], ends[1:], constants)
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "model.onnx")
    values = generator.standard_normal((16, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    int8.write_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx", [tmp_path / "x.npy"], ["scores", "y"])
    scores = np.exp(values @ weights[0] + mask)
    expected = scores / scores.sum(1, keepdims=True) @ weights[1]
    (found,) = onnxruntime.InferenceSession(tmp_path / "int8.onnx").run(None, {"x": values})
    assert np.abs(found - expected).max() < 0.1 * expected.std()


def test_an_int8_model_that_its_runtime_cannot_run_is_not_written(checkpoint, tmp_path, capsys, monkeypatch):
    def engine(path):
        raise ValueError("unknown operator")

    monkeypatch.setattr(int8, "MOST_LOST", 1.0)
    monkeypatch.setitem(engines.ENGINES, "openvino", engine)
    words = ["export", str(checkpoint), "--format", "openvino", "--output", str(tmp_path / "exported"), *CALIBRATION]
    assert main(words) == 1
    assert "does not run there (unknown operator)" in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--int8",), "need each other"),
        (("--calibration", "synthetic"), "need each other"),
        (("--calibration_images", "3"), "number of images for --int8"),
        (CALIBRATION, "for the formats onnx, openvino, web, transformers_js"),
    ],
)
def test_int8_options_that_do_not_fit_are_refused(checkpoint, tmp_path, capsys, words, message):
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "exported"), *words]) == 2
    assert message in capsys.readouterr().err and not any(tmp_path.iterdir())


@torch.no_grad()
def test_tensorflow_padding_of_timm_is_exported_for_any_size(tmp_path):
    """Even and odd sides at every stride: the sides that are padded depend on both; kernels below their stride too."""
    torch.manual_seed(0)
    layers = (Conv2dSame(3, 3, side, stride) for side, stride in ((3, 2), (5, 2), (1, 2), (3, 3), (5, 2)))
    program = torch.nn.Sequential(*layers).eval()
    traced = exporting.trace(program, 3, None)
    FORMATS["onnx"].write(traced, tmp_path / "model.onnx", "pixel_values", ("logits",))
    runs = traced.module(), engines.OnnxEngine(tmp_path / "model.onnx")
    for size in ((96, 128), (97, 131), (51, 66), (192, 145)):
        values = torch.randn(1, 3, *size)
        for run in runs:
            torch.testing.assert_close(run(values)[0].view(program(values)[0].shape), program(values)[0])


@pytest.mark.slow
def test_hlg_is_exported_for_maps_of_one_window_and_of_many(tmp_path):
    """Sizes with and without padding; views of the attention's output must fit in ONNX too."""
    torch.manual_seed(0)
    fields = {"hidden_sizes": [16, 16, 32, 32], "depths": [2, 1, 1, 1], "num_attention_heads": [2, 2, 4, 2]}
    model = hf_denseseg.HlgForSemanticSegmentation(
        hf_denseseg.HlgConfig(**fields, decoder_hidden_size=32, auxiliary_hidden_size=8, num_labels=5)
    ).eval()
    model.save_pretrained(tmp_path / "model")
    create_image_processor(model.config, do_resize=False).save_pretrained(tmp_path / "model")
    words = ["--format", "onnx", "--output", str(tmp_path / "exported")]
    assert main(["export", str(tmp_path / "model"), *words]) == 0
    engine = engines.OnnxEngine(tmp_path / "exported" / "model.onnx")
    for size in ((33, 64), (61, 93), (224, 448)):
        pixel_values = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = model(pixel_values).logits
        assert (engine(pixel_values)[0] - expected).abs().max() < 1e-4 * expected.std()
