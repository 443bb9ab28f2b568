"""Make the checkpoint of `hf_denseseg.example_checkpoint()` from a finished run.

    denseseg train scripts/recipes/hfgd/hfgd_lite0_drawn_streets_cpu.yaml --encoder_weights lite0.safetensors
    python scripts/ship_example.py runs/hfgd_lite0_drawn_streets_cpu --camvid path/to/camvid

Stores the weights in half precision (they are loaded as float32), scores what was stored on the validation images of
CamVid, which are real streets and were never trained on, and writes both into the card. The photograph comes with
scikit-learn; `docs/images/example.jpg` shows the prediction for it and for a drawn street.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file, save_file

from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.segmentation import load_segmentation
from hf_denseseg.models.auto.example import FOLDER
from hf_denseseg.visualization.label_maps import legend
from hf_denseseg.visualization.layout import fit_width, labeled_rows

ROOT = Path(__file__).resolve().parents[1]
FILES = ("config.json", "preprocessor_config.json", "inference_settings.json", "labels.json")
TITLES, WIDTH = ("image", "prediction", "overlay"), 420  # pixels of each panel
SPEC = "scripts/camvid_as_streets.yaml"
PHOTO = """
The photograph `photo.jpg` is by [danielbuechele](https://www.flickr.com/photos/danielbuechele/6061409035/), under
[CC BY 2.0](https://creativecommons.org/licenses/by/2.0/), as distributed with scikit-learn (`china.jpg`).
The ImageNet weights of EfficientNet-Lite0 are Apache-2.0.
"""


def store(model: Path) -> None:
    """Copy a saved model without the code beside it; floating-point weights in half precision."""
    FOLDER.mkdir(exist_ok=True)
    for name in FILES:
        content = json.loads((model / name).read_text())
        content.pop("auto_map", None)  # the classes are in this package
        (FOLDER / name).write_text(json.dumps(content, indent=1) + "\n")
    weights = load_file(model / "model.safetensors")
    halves = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    save_file(halves, FOLDER / "model.safetensors", {"format": "pt"})
    photo = Path(importlib.util.find_spec("sklearn").origin).parent / "datasets" / "images" / "china.jpg"
    shutil.copyfile(photo, FOLDER / "photo.jpg")


def score(camvid: str, output: Path) -> dict:
    """Evaluate what was stored on CamVid's validation images."""
    words = ["--dataset", camvid, "--eval_split", "val", "--label_spec", SPEC, "--output_dir", str(output)]
    # The path stands in the results.
    model = str(FOLDER.relative_to(ROOT))
    subprocess.run([sys.executable, "-m", "hf_denseseg.cli", "evaluate", model, *words], check=True, cwd=ROOT)
    return json.loads((output / "results.json").read_text())


def write_card(card: str, results: dict) -> None:
    """The card of the run, the scores on real streets, and whose photograph it is."""
    scores = results["scores"]
    figures = "\n".join(f"| {each['class']} | {100 * each['iou']:.2f} |" for each in scores["per_class"])
    found = (
        f"## On real streets\n\nIt has seen drawings only. On the {results['images']} validation images of CamVid "
        f"(`denseseg evaluate` with `--label_spec {SPEC}`): mIoU {100 * scores['mean_iou']:.1f} %, pixel accuracy "
        f"{100 * scores['pixel_accuracy']:.1f} %.\n\n| class | IoU % |\n|---|---|\n{figures}\n\n"
    )
    card = card.replace("## Training", found + "## Training").replace("## Citation", PHOTO.lstrip() + "\n## Citation")
    use = 'pipeline("image-segmentation", model=hf_denseseg.example_checkpoint())'
    card = card.replace('pipeline("image-segmentation", model="path/to/this/folder")', use)
    card = card.replace('segment("street.jpg")', 'segment(hf_denseseg.example_checkpoint() + "/photo.jpg")')
    (FOLDER / "README.md").write_text(card)


def draw(path: Path) -> None:
    """A drawn street that it was not trained on and the photograph: image, prediction and overlay, and the classes."""
    inputs, output = ROOT / "runs" / "example_images", ROOT / "runs" / "example_predicted"
    shutil.rmtree(output, ignore_errors=True)
    inputs.mkdir(parents=True, exist_ok=True)
    load_segmentation("synthetic:500@384x576", "test", limit=1).dataset[0]["image"].save(inputs / "drawn.png")
    shutil.copyfile(FOLDER / "photo.jpg", inputs / "photo.jpg")
    words = [str(FOLDER), str(inputs), "--output_dir", str(output)]
    subprocess.run([sys.executable, "-m", "hf_denseseg.cli", "predict", *words], check=True)
    rows = []
    for image in (inputs / "drawn.png", inputs / "photo.jpg"):
        files = (image, output / "masks" / f"{image.stem}.png", output / "overlays" / f"{image.stem}.jpg")
        panels = [fit_width(Image.open(file).convert("RGB"), WIDTH, Image.Resampling.LANCZOS) for file in files]
        rows.append(list(zip(TITLES, panels, strict=True)))
    names = legend(LabelSpec.from_file(FOLDER / "labels.json"), 3 * WIDTH)
    labeled_rows(rows, names).save(path, quality=85)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of the recipe")
    parser.add_argument("--camvid", required=True, help="folder of pairs, see docs/data.md")
    args = parser.parse_args()
    store(args.run / "model")
    output = ROOT / "runs" / "example_on_camvid"
    results = score(args.camvid, output)
    kept = ROOT / "scripts" / "results" / args.run.name
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.run / "results.json", kept / "results.json")
    shutil.copyfile(output / "results.json", kept / "camvid_val.json")
    write_card((args.run / "model" / "README.md").read_text(), results)
    draw(ROOT / "docs" / "images" / "example.jpg")
    size = (FOLDER / "model.safetensors").stat().st_size
    print(f"Written: {FOLDER} ({size / 2**20:.2f} MiB of weights)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
