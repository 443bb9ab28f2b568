"""`denseseg export --format web` and `transformers_js`: the folders, and the page, which gives what `predict` gives.

Chromium needs no driver: a page of this file holds the exported one in a frame of a chosen size, gives it files as a
user's choice or drop would, and posts what it shows to the web server of the test.
"""

import http.server
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from transformers import SegformerConfig
from transformers.models.segformer.image_processing_segformer import SegformerImageProcessor

import hf_denseseg
from hf_denseseg import load_segmentation
from hf_denseseg.cli import main
from hf_denseseg.inference.export import int8, web_runtime
from hf_denseseg.models.auto.registration import create_image_processor
from hf_denseseg.reports.web_page import page_text
from tiny_models import TINY_SETR, save_decided_setr

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
INT8 = ("--int8", "--calibration", "synthetic", "--calibration_images", "3", "--use_cpu")
SECONDS = 120  # for the browser to start, load the model and segment

# Frame of width x height; then for each file: choose or drop it, wait, post the state of the page.
HARNESS = """<!doctype html><body style="margin:0"><iframe id="frame" style="border:0"></iframe><script type="module">
const plan = await (await fetch("plan.json")).json(), frame = document.getElementById("frame");
Object.assign(frame, {width: plan.width, height: plan.height, src: "index.html"});
await new Promise((done) => { frame.onload = done; });
const page = frame.contentWindow, root = page.document.documentElement;
const until = async (states) => {
  while (!states.includes(root.dataset.state)) await new Promise((done) => setTimeout(done, 50)); };
await until(["ready", "error"]);
const shown = [];
for (const [name, how] of plan.files) {
  const transfer = new page.DataTransfer(), input = page.document.getElementById("file");
  transfer.items.add(new page.File([await (await fetch(name)).blob()], name));
  root.dataset.state = "given"; page.classMap = null;
  if (how === "drop") page.dispatchEvent(new page.DragEvent("drop", {dataTransfer: transfer, cancelable: true}));
  else { input.files = transfer.files; input.dispatchEvent(new page.Event("change")); }
  await until(["done", "error"]);
  const map = page.classMap, text = (id) => page.document.getElementById(id).innerText;
  shown.push({state: root.dataset.state, message: text("message"), legend: text("legend"),
    visible: !page.document.getElementById("result").hidden,
    size: map && [map.height, map.width], classes: map && Array.from(map.data),
    overflow: root.scrollWidth - root.clientWidth});
}
await fetch("shown", {method: "POST", body: JSON.stringify(shown)});
</script>"""


# transformers.js as its documentation has it, but for the address of its WebAssembly; posts one class map per image.
TRANSFORMERS_JS = """<!doctype html><script type="module">
import { env, pipeline } from "./transformers.min.js";
env.allowRemoteModels = false;
Object.assign(env, {allowLocalModels: true, localModelPath: "models/", useBrowserCache: false});
env.backends.onnx.wasm.wasmPaths = new URL("./", location.href).href;
const segment = await pipeline("image-segmentation", "own"), maps = [];
const ids = Object.fromEntries(Object.entries(segment.model.config.id2label).map(([id, name]) => [name, +id]));
for (const name of NAMES) {
  const found = await segment(name), map = new Array(found[0].mask.data.length).fill(255);
  for (const { label, mask } of found) mask.data.forEach((value, i) => { if (value) map[i] = ids[label]; });
  maps.push(map);
}
await fetch("shown", {method: "POST", body: JSON.stringify(maps)});
</script>"""
NODE_MODULES = os.environ.get("DENSESEG_NODE_MODULES")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_decided_setr(tmp_path_factory.mktemp("setr") / "model")


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A package with the names of onnxruntime-web's files."""
    folder = tmp_path_factory.mktemp("npm") / "package"
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": "onnxruntime-web", "version": "1.2.3"}))
    for name in web_runtime.FILES:
        (folder / "dist" / name).write_bytes(name.encode())
    return folder


@pytest.fixture(scope="module")
def page(checkpoint, stand_in, tmp_path_factory):
    folder = tmp_path_factory.mktemp("web") / "page"
    words = ["--format", "web", "--onnxruntime_web", str(stand_in), "--output", str(folder)]
    assert main(["export", str(checkpoint), *words]) == 0
    return folder


# --- the folder


def test_the_folder_holds_all_that_the_page_needs(page):
    record = json.loads((page / "export.json").read_text())
    files = {"README.md", "config.json", "index.html", "model.onnx", "preprocessor_config.json", *web_runtime.FILES}
    assert {path.name for path in page.iterdir()} == {*files, "export.json"} and set(record["files"]) == files
    assert (record["with_argmax"], record["versions"]["onnxruntime-web"]) == (True, "1.2.3")
    assert (page / web_runtime.FILES[0]).read_bytes() == web_runtime.FILES[0].encode()


def test_the_page_asks_for_nothing_outside_its_folder(page):
    text = (page / "index.html").read_text()
    assert not re.findall(r"""(?:https?:)?//[\w.-]+\.\w+/""", text)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text).group(1)
    assert "default-src 'none'" in policy and not re.search(r"https?:|\*", policy)
    settings = json.loads(re.search(r'id="settings">(.*?)</script>', text, re.DOTALL).group(1))
    spec = load_segmentation("synthetic", "val", limit=1).spec
    assert [each["name"] for each in settings["classes"]] == list(spec.classes)


def test_a_tarball_of_npm_serves_as_well_as_its_folder(stand_in, tmp_path):
    with tarfile.open(tmp_path / "runtime.tgz", "w:gz") as archive:
        archive.add(stand_in, arcname="package")
    assert web_runtime.find_runtime(str(tmp_path / "runtime.tgz")) == web_runtime.find_runtime(str(stand_in))


@pytest.mark.parametrize("fault", ["missing", "other package", "no package", "cut short"])
def test_what_is_no_runtime_is_refused_with_the_command_that_gets_it(checkpoint, stand_in, tmp_path, capsys, fault):
    given = tmp_path / "given"
    if fault == "other package":
        shutil.copytree(stand_in, given)
        (given / "package.json").write_text('{"name": "onnxruntime-node", "version": "1"}')
    elif fault == "no package":
        given.mkdir()
    elif fault == "cut short":
        with tarfile.open(given, "w:gz") as archive:
            archive.add(stand_in, arcname="package")
        given.write_bytes(given.read_bytes()[:120])
    words = ["--format", "web", "--onnxruntime_web", str(given), "--output", str(tmp_path / "page")]
    assert main(["export", str(checkpoint), *words]) == 2
    assert "npm pack onnxruntime-web@" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_without_npm_the_command_to_run_elsewhere_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(hf_denseseg.errors.InputError, match="npm is not installed.*npm pack onnxruntime-web@"):
        web_runtime.find_runtime(None)


def test_what_no_page_can_show_is_refused_before_the_export(checkpoint, stand_in, tmp_path, capsys):
    """Other tasks, images that are not RGB, and the option with another format."""
    words = ["--onnxruntime_web", str(stand_in), "--output", str(tmp_path / "page")]
    for name, format_name, change, reason in (
        ("task", "web", {"architectures": ["HlgForImageClassification"], "model_type": "hlg"}, "image-classification"),
        ("channels", "web", {"num_channels": 4}, "have 4 channels"),
        ("format", "onnx", {}, "is for --format web"),
    ):
        (tmp_path / name).mkdir()
        config = {} if name == "task" else json.loads((checkpoint / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
        assert main(["export", str(tmp_path / name), "--format", format_name, *words]) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_class_names_cannot_end_the_script(tmp_path):
    text = page_text(tmp_path, ["</script><b>", "road"], [64, 96], "1.2.3")
    assert "</script><b>" not in text and "resized to 96 × 64 pixels" in text


# --- the form that transformers.js opens


def test_transformers_js_gets_a_segformer_with_the_classes_of_the_checkpoint(checkpoint, tmp_path):
    """Read by transformers' own Segformer classes and run by ONNX Runtime: the classes of `denseseg predict`."""
    folder, images = tmp_path / "segformer", tmp_path / "images"
    assert main(["export", str(checkpoint), "--format", "transformers_js", "--output", str(folder)]) == 0
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"README.md", "config.json", "export.json", "onnx/model.onnx", "preprocessor_config.json"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["transformers.js_config"]) == ("segformer", {"dtype": "fp32"})
    assert (
        SegformerConfig.from_pretrained(folder).id2label == hf_denseseg.SetrConfig.from_pretrained(checkpoint).id2label
    )
    images.mkdir()
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((61, 75))
    coarse.save(images / "image.png")
    for name, model in (("own", checkpoint), ("exported", folder)):
        assert main(["predict", str(model), str(images), "--output_dir", str(tmp_path / name)]) == 0
    masks = [np.asarray(Image.open(tmp_path / name / "masks/image.png")) for name in ("own", "exported")]
    values = SegformerImageProcessor.from_pretrained(folder)(coarse, return_tensors="np")["pixel_values"]
    (logits,) = onnxruntime.InferenceSession(folder / "onnx/model.onnx").run(None, {"pixel_values": values})
    assert np.array_equal(masks[1], masks[0]) and np.array_equal(logits[0].argmax(0), masks[0])
    assert len(np.unique(masks[0])) > 1
    (folder / "onnx/model.onnx").write_bytes(b"cut short")
    assert main(["predict", str(folder), str(images), "--output_dir", str(tmp_path / "damaged")]) == 2


def test_transformers_js_cannot_run_what_is_no_segformer(checkpoint, tmp_path, capsys):
    words = ["--format", "transformers_js", "--output", str(tmp_path / "segformer")]
    assert main(["export", str(checkpoint), *words, "--with_argmax"]) == 2
    assert "Leave --with_argmax out" in capsys.readouterr().err
    fields = {**TINY_SETR, "num_hidden_layers": 2, "auxiliary_layers": [0, 1], "num_labels": 1}
    one = hf_denseseg.create_model("setr-naive-deit-base", **fields)
    one.save_pretrained(tmp_path / "one")
    create_image_processor(one.config, do_resize=False).save_pretrained(tmp_path / "one")
    assert main(["export", str(tmp_path / "one"), *words]) == 2
    assert "one logit per class" in capsys.readouterr().err and not (tmp_path / "segformer").exists()


# --- in the browser


@pytest.fixture(scope="module")
def served(page, tmp_path_factory):
    """The page with the real runtime, if both it and a browser are here."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    if not web_runtime.cached_tarball().exists():
        pytest.skip(f"onnxruntime-web is not there: {web_runtime.COMMAND} in {web_runtime.cached_tarball().parent}")
    runtime = web_runtime.find_runtime(None)
    folder = tmp_path_factory.mktemp("served") / "page"
    shutil.copytree(page, folder)
    for name, content in runtime.files.items():
        (folder / name).write_bytes(content)
    (folder / "harness.html").write_text(HARNESS)
    return folder


def show(folder: Path, files: list[tuple[str, str]], tmp_path: Path, width: int = 1280, height: int = 800):
    """Give files to the page, and return what it shows for each, and the addresses that the browser asked for."""
    (folder / "plan.json").write_text(json.dumps({"files": files, "width": width, "height": height}))
    return browse(folder, "harness.html", tmp_path)


def browse(folder: Path, page: str, tmp_path: Path):
    """Open a page of a folder, and return what it posts, and the addresses that the browser asked for."""
    posted, asked = [], []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def do_POST(self):
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            arrived.set()

        def log_message(self, text, *args):
            asked.append(self.path)

    arrived = threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        address = f"http://127.0.0.1:{server.server_port}/{page}"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        browser = subprocess.Popen([CHROMIUM, *words, "--remote-debugging-port=0", address], **quiet)
        try:
            assert arrived.wait(SECONDS), f"the browser posted nothing in {SECONDS} s; it asked for {asked}"
        finally:
            browser.kill()
            browser.wait()
            server.shutdown()
    return posted[0], asked


@pytest.mark.slow
def test_the_browser_gives_the_classes_of_predict(served, checkpoint, tmp_path):
    """Three images, chosen and dropped: two PNG files, and a JPEG file that EXIF turns."""
    generator = np.random.default_rng(0)
    images = tmp_path / "images"
    images.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: by a quarter
    for name, size, options in (
        ("odd.png", (61, 75), {}),
        ("wide.png", (200, 96), {}),
        ("turned.jpg", (64, 80), {"exif": turned}),
    ):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize(size).save(images / name, **options)
        shutil.copy(images / name, served)
    assert main(["predict", str(checkpoint), str(images), "--output_dir", str(tmp_path / "out")]) == 0
    files = [("odd.png", "choose"), ("wide.png", "drop"), ("turned.jpg", "choose")]
    shown, asked = show(served, files, tmp_path)
    for (name, _), found in zip(files, shown, strict=True):
        expected = np.asarray(Image.open((tmp_path / "out" / "masks" / name).with_suffix(".png")))
        assert (found["state"], found["size"], found["overflow"]) == ("done", list(expected.shape), 0), found
        assert "ms" in found["message"] and "%" in found["legend"]
        assert np.array_equal(np.array(found["classes"]).reshape(expected.shape), expected)
    assert all(not path.startswith("http") for path in asked)


@pytest.mark.slow
def test_the_browser_runs_int8(served, checkpoint, tmp_path, monkeypatch):
    """The classes of the same model on ONNX Runtime, on a fourth of the bytes."""
    monkeypatch.setattr(int8, "MOST_LOST", 1.0)  # random weights lose more than trained ones
    folder, image = tmp_path / "page", np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    assert main(["export", str(checkpoint), "--format", "web", "--output", str(folder), *INT8]) == 0
    (folder / "harness.html").write_text(HARNESS)
    files = [("odd.png", "choose"), ("wide.png", "drop")]
    for (name, _), size in zip(files, ((61, 75), (200, 96)), strict=True):
        Image.fromarray(image).resize(size).save(folder / name)
    shown, _ = show(folder, files, tmp_path)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for (name, _), found in zip(files, shown, strict=True):
        pixels = np.asarray(Image.open(folder / name)).transpose(2, 0, 1)[None]
        (expected,) = session.run(None, {"image": pixels})
        assert found["state"] == "done", found
        assert (np.array(found["classes"]) == expected.ravel()).mean() > 0.99
    assert (folder / "model.onnx").stat().st_size < 0.5 * (served / "model.onnx").stat().st_size


@pytest.mark.slow
def test_a_phone_a_large_photograph_and_a_file_that_is_no_image(served, tmp_path):
    """390 x 844: nothing to scroll sideways; 6000 x 4000 pixels are reduced, and the page says so."""
    (served / "notes.jpg").write_bytes(b"no image")
    photograph = io.BytesIO()
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    coarse.resize((6000, 4000)).save(photograph, "jpeg", quality=70)
    (served / "photograph.jpg").write_bytes(photograph.getvalue())
    files = [("notes.jpg", "choose"), ("photograph.jpg", "drop"), ("notes.jpg", "drop")]
    (refused, large, again), _ = show(served, files, tmp_path, width=390, height=844)
    for each in (refused, again):
        assert each["state"] == "error" and "notes.jpg is no image" in each["message"] and not each["visible"]
    assert large["state"] == "done" and large["size"] == [683, 1024] and "resized from 6000 × 4000" in large["message"]
    assert all(each["overflow"] <= 0 for each in (refused, large, again))


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), INT8], ids=["float32", "int8"])
@pytest.mark.skipif(
    CHROMIUM is None or not NODE_MODULES,
    reason="no Chromium, or DENSESEG_NODE_MODULES is not set to the "
    "node_modules of `npm install --ignore-scripts @huggingface/transformers@4.3`",
)
def test_transformers_js_gives_the_classes_of_predict(checkpoint, tmp_path, monkeypatch, words):
    """Of the checkpoint; of the export itself in int8."""
    monkeypatch.setattr(int8, "MOST_LOST", 1.0)
    folder, images = tmp_path / "site", tmp_path / "images"
    exported = folder / "models" / "own"
    command = ["export", str(checkpoint), "--format", "transformers_js", "--output", str(exported)]
    assert main([*command, *words]) == 0
    modules = Path(NODE_MODULES)
    shutil.copy(modules / "@huggingface/transformers/dist/transformers.min.js", folder)
    for path in (modules / "onnxruntime-web/dist").glob("ort-wasm-simd-threaded.*"):
        shutil.copy(path, folder)
    images.mkdir()
    sizes = {"odd.png": (61, 75), "wide.png": (200, 96), "large.png": (480, 360)}
    for name, size in sizes.items():
        coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize(size).save(images / name)
        shutil.copy(images / name, folder)
    (folder / "index.html").write_text(TRANSFORMERS_JS.replace("NAMES", json.dumps(list(sizes))))
    model = exported if words else checkpoint
    assert main(["predict", str(model), str(images), "--output_dir", str(tmp_path / "out")]) == 0
    maps, _ = browse(folder, "index.html", tmp_path)
    for name, found in zip(sizes, maps, strict=True):
        expected = np.asarray(Image.open(tmp_path / "out" / "masks" / name))
        agreement = (np.array(found).reshape(expected.shape) == expected).mean()
        assert agreement >= (0.99 if words else 1)  # processors round products of 8 bits in two ways
