"""The page and the endpoint of a checkpoint give what `denseseg predict` gives, and survive hostile uploads."""

import base64
import concurrent.futures
import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from huggingface_hub import SpaceCard
from PIL import Image

import hf_denseseg
from hf_denseseg.cli import main
from hf_denseseg.errors import InputError
from hf_denseseg.inference.predict.objects import ObjectPredictor
from hf_denseseg.inference.serving import app, hub
from hf_denseseg.inference.serving.endpoint import EndpointHandler
from hf_denseseg.inference.serving.service import ImageService, settings_of

SMALL = {"spatial_hidden_sizes": [8, 16, 32], "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 6}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "dsct"
    hf_denseseg.create_model("dsct-tiny-sac", num_labels=4, **SMALL).save_pretrained(folder)
    hf_denseseg.DsctImageProcessor(do_resize=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "street.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def service(checkpoint):
    return ImageService(str(checkpoint))


def bomb() -> bytes:
    """A PNG of a few bytes that declares 60000x60000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def predicted(checkpoint, image, output, *words):
    """The mask and the record of `denseseg predict`."""
    assert main(["predict", str(checkpoint), str(image), "--output_dir", str(output), *words]) == 0
    record = json.loads((output / "results.json").read_text())["images"][0]
    return np.asarray(Image.open(output / record["mask"])), record


def test_mask_and_table_are_those_of_predict(checkpoint, image, service, tmp_path):
    mask, record = predicted(checkpoint, image, tmp_path / "predict")
    served = service.predict(str(image), tmp_path)
    assert served.files["mask"].read_bytes() == (tmp_path / "predict" / record["mask"]).read_bytes()
    assert served.rows == record["classes"] and served.files["overlay"].name == "overlay.jpg"
    window = settings_of(32, [1.0, 0.5], True)
    words = ["--test_crop_size", "32", "32", "--test_scales", "0.5", "1.0", "--test_flip"]
    mask, record = predicted(checkpoint, image, tmp_path / "windows", *words)
    served = service.predict(str(image), tmp_path, settings=window)
    assert (np.asarray(Image.open(served.files["mask"])) == mask).all() and served.rows == record["classes"]


def test_switches_left_alone_keep_the_protocol_of_the_checkpoint():
    assert settings_of(0, [], False) == {}
    with pytest.raises(InputError, match="window is -3"):
        settings_of(-3, [], False)


@pytest.mark.parametrize("turned", [False, True])
def test_uncertain_pixels_of_the_overlay_are_those_of_the_image(turned, service, tmp_path):
    image, exif = tmp_path / "smooth.png", Image.Exif()  # which a JPEG keeps
    smooth = Image.linear_gradient("L").resize((90, 70)).convert("RGB")
    exif[0x0112] = 8 if turned else 1  # turned by 90 degrees
    (smooth.transpose(Image.Transpose.ROTATE_270) if turned else smooth).save(image, exif=exif)
    served = service.predict(str(image), tmp_path)
    confidence = np.asarray(Image.open(served.files["confidence"])) / 255
    least = float(np.quantile(confidence, 0.5))
    before = np.asarray(Image.open(served.files["overlay"])).astype(int)
    served = service.predict(str(image), tmp_path, least_confidence=least)
    after, plain = np.asarray(Image.open(served.files["overlay"])).astype(int), np.asarray(smooth).astype(int)
    low = confidence < least - 0.01
    assert low.any() and np.abs(after - plain)[low].mean() < np.abs(before - plain)[low].mean() / 2
    with Image.open(served.files["mask"]) as mask:
        assert mask.size == (90, 70)


def test_detections_are_those_of_the_predictor(tmp_path, image):
    torch.manual_seed(0)
    fields = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
    model = hf_denseseg.create_model("hlg-retinanet-tiny", num_labels=3, pyramid_hidden_size=32, **fields)
    model.detection_head.classification_head.cls_logits.bias.data.fill_(1.0)
    model.save_pretrained(tmp_path / "model")
    hf_denseseg.HlgImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(tmp_path / "model")
    service = ImageService(str(tmp_path / "model"))
    served = service.predict(str(image), tmp_path, threshold=0.0)
    predictor = ObjectPredictor.load(str(tmp_path / "model"), "object-detection", threshold=0.0)
    assert served.rows == predictor.find(Image.open(image))[0] and served.rows
    assert served.files.keys() == {"drawn"}
    handler = EndpointHandler(str(tmp_path / "model"))
    found = handler({"inputs": image.read_bytes(), "parameters": {"threshold": 0.0}})
    assert found == served.rows


def test_endpoint_returns_a_mask_per_class(checkpoint, image, tmp_path):
    mask, record = predicted(checkpoint, image, tmp_path)
    handler = EndpointHandler(str(checkpoint))
    data = {"inputs": base64.b64encode(image.read_bytes()).decode()}
    for inputs in (data["inputs"], "data:image/png;base64," + data["inputs"], image.read_bytes(), Image.open(image)):
        found = handler({"inputs": inputs})
        assert [each["label"] for each in found] == [row["class"] for row in record["classes"]]
        for each in found:
            own = np.asarray(Image.open(io.BytesIO(base64.b64decode(each["mask"]))))
            assert (own == 255 * (mask == int(each["label"].removeprefix("LABEL_")))).all()
    json.dumps(found)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"inputs": b"no image"}, "not a readable image"),
        ({"inputs": "no base64!"}, "not base64"),
        ({}, "inputs is a NoneType"),
        ({"inputs": bomb()}, "decompression bomb"),
        ({"inputs": b"", "parameters": {"size": 3}}, "size is unknown"),
    ],
)
def test_endpoint_explains_what_it_cannot_use_and_lives_on(checkpoint, image, data, message):
    handler = EndpointHandler(str(checkpoint))
    assert message in handler(data)["error"]
    assert handler({"inputs": image.read_bytes()})[0]["label"]


def test_files_of_the_space_and_the_endpoint(monkeypatch):
    files = hub.space_files("org/dsct-demo", license="apache-2.0")
    assert files.keys() == {"app.py", "requirements.txt", "README.md"} and "[app]" in files["requirements.txt"]
    data = SpaceCard(files["README.md"]).data
    assert (data.sdk, data.app_file, data.models) == ("gradio", "app.py", ["org/dsct-demo"])
    calls = []
    monkeypatch.setattr(app, "launch", lambda *args, **options: calls.append((args, options)))
    exec(files["app.py"], {})
    assert calls == [(("org/dsct-demo",), {"title": "dsct-demo"})]
    names: dict = {}
    exec(hub.endpoint_files()["handler.py"], names)
    assert names["EndpointHandler"] is EndpointHandler


def test_serve_without_gradio_names_the_extra(checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert main(["serve", str(checkpoint)]) == 2
    assert "pip install 'hf-denseseg[app]'" in capsys.readouterr().err
    assert main(["serve", str(checkpoint), "--examples", "nowhere.png"]) == 2


@pytest.fixture(scope="module")
def client(service):
    pytest.importorskip("gradio", reason="gradio is not installed (extra `app`)")
    gradio_client = pytest.importorskip("gradio_client")
    page = app.build_app(service, "street")
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, max_file_size=app.MAX_UPLOAD, show_error=True)
    yield gradio_client.Client(address, verbose=False), gradio_client.handle_file
    page.close()


@pytest.mark.parametrize("kind", ["png", "gray.png", "turned.jpg", "palette.gif"])
def test_page_gives_the_mask_of_predict(kind, client, checkpoint, image, tmp_path):
    page, upload = client
    if kind != "png":
        mode = {"gray.png": "L", "palette.gif": "P"}.get(kind, "RGB")
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        turned = {"exif": exif} if kind == "turned.jpg" else {}
        Image.open(image).convert(mode).save(tmp_path / kind, **turned)
        image = tmp_path / kind
    mask, record = predicted(checkpoint, image, tmp_path / "predict")
    overlay, file, classes = page.predict(upload(str(image)), 0, [], False, 0.0, api_name="/predict")
    assert (np.asarray(Image.open(file)) == mask).all()
    assert [row[1] for row in classes["data"]] == [row["class"] for row in record["classes"]]
    assert all("background: rgb(" in row[0] for row in classes["data"])


def test_page_tells_of_a_hostile_upload_and_lives_on(client, image, tmp_path):
    page, upload = client
    (tmp_path / "bomb.png").write_bytes(bomb())
    (tmp_path / "text.png").write_text("no image")
    for name in ("bomb.png", "text.png"):
        with pytest.raises(Exception, match=r"decompression bomb|cannot identify"):
            page.predict(upload(str(tmp_path / name)), 0, [], False, 0.0, api_name="/predict")
    assert page.predict(upload(str(image)), 0, [], False, 0.0, api_name="/predict")[1]


def test_fifty_requests_at_once_all_get_a_mask(client, image):
    page, upload = client

    def ask(number: int) -> str:
        return page.predict(upload(str(image)), 32 if number % 2 else 0, [], False, 0.0, api_name="/predict")[1]

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        masks = [np.asarray(Image.open(each)) for each in pool.map(ask, range(50))]
    assert all((each == masks[number % 2]).all() for number, each in enumerate(masks))
