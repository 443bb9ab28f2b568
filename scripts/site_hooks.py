"""Pages and images of the site that lie elsewhere in the repository or are made, and links between all of them.

mkdocs calls `on_files` and `on_page_markdown`, see `mkdocs.yml`.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

import hf_denseseg
from hf_denseseg.models.auto import registration
from hf_denseseg.reports.model_card import paper_of

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\((?!https?://|#|mailto:|data:)([^)#\s]+)(#[^)]*)?\)")
# Page or image of the site -> file of the repository.
ELSEWHERE = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "accelerate.md": "scripts/accelerate/README.md",
    **{f"papers/{name}.md": f"src/hf_denseseg/models/{name}/README.md" for name in registration.families()},
    **{f"cards/{path.name}": f"model_cards/{path.name}" for path in sorted((ROOT / "model_cards").glob("*.md"))},
    "cards/example.md": "src/hf_denseseg/models/example/README.md",
    **{
        f"notebooks/{path.stem}.md": f"docs/notebooks/{path.name}"
        for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
    },
}
IMAGES = {
    "images/leaderboard_camvid.png": "scripts/results/leaderboard/camvid.png",
    "images/leaderboard_camvid_from_scratch.png": "scripts/results/leaderboard/camvid_from_scratch.png",
    "images/guidance_camvid.png": "scripts/results/guidance/camvid_lite0_200_steps.png",
}
FUNCTIONS = {  # public functions and classes that are no model, by what they are for
    "Models": [
        "create_config",
        "create_image_processor",
        "create_model",
        "list_models",
        "load_official",
        "model_info",
    ],
    "Checkpoints": ["example_checkpoint", "write_code"],
    "Data": ["load_segmentation", "load_classification", "load_detection"],
}
INHERITING = "hf_denseseg.models.image_processing.SegmentationImageProcessor"  # its methods are those of a mixin
MORE = {
    "Models": ["hf_denseseg.models.flops.ModelInfo"],
    "Image processors": [INHERITING, "hf_denseseg.models.image_processing.SegmentationImageProcessorKwargs"],
    "Inference": [
        "hf_denseseg.inference.pipeline.SlidingWindowSegmentationPipeline",
        "hf_denseseg.inference.settings.InferenceSettings",
    ],
    "Data": ["hf_denseseg.data.labels.LabelSpec", "hf_denseseg.data.class_names.ClassNames"],
    "Evaluation": [
        "hf_denseseg.evaluation.segmentation_metrics.ConfusionMeter",
        "hf_denseseg.evaluation.segmentation_metrics.segmentation_metrics",
    ],
    "Training": [
        "hf_denseseg.training.recipe.load_recipe",
        "hf_denseseg.training.recipe.make_recipe",
        "hf_denseseg.training.run.train",
        "hf_denseseg.training.run.evaluate",
        "hf_denseseg.training.trainer.TaskTrainer",
    ],
    "Errors": ["hf_denseseg.errors.InputError", "hf_denseseg.errors.RunError"],
    "Kernels": [
        "hf_denseseg.ops.ms_deform_attn.ms_deform_attn",
        "hf_denseseg.ops.kernelize.kernelize_deformable_attention",
    ],
}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from elsewhere, and the reference."""
    from mkdocs.structure.files import File

    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=relink(text_of(source), source, page)))
    for image, source in IMAGES.items():
        files.append(File.generated(config, image, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, "reference.md", content=reference()))
    return files


def text_of(source: str) -> str:
    """Markdown of a file of the repository; of a notebook its cells with their outputs."""
    text = (ROOT / source).read_text()
    if not source.endswith(".ipynb"):
        return text
    parts = []
    for cell in json.loads(text)["cells"]:
        body = "".join(cell["source"])
        if cell["cell_type"] == "code":
            magic, _, commands = body.partition("\n")
            body = f"```bash\n{commands}\n```" if magic == "%%bash" else f"```python\n{body}\n```"
        parts += [body, *map(output_text, cell.get("outputs", ()))]
    return "\n\n".join(parts) + "\n"


def output_text(output: dict[str, Any]) -> str:
    """Markdown of one output of a notebook: its image, or its text."""
    data = output.get("data", {})
    for kind in data.keys() & {"image/png", "image/jpeg"}:
        return f"![output](data:{kind};base64,{''.join(''.join(data[kind]).split())})"
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.strip()}\n```"


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Relink the pages of docs/; the others were relinked when they were added."""
    name = page.file.src_uri
    return markdown if name in ELSEWHERE or name == "reference.md" else relink(markdown, f"docs/{name}", name)


def relink(text: str, source: str, page: str) -> str:
    """Point links between files of the repository to pages of the site; links to other files become their text.

    Args:
        text: Markdown.
        source: path of the file in the repository.
        page: path of its page in the site.
    """
    pages = {file: name for name, file in (ELSEWHERE | IMAGES).items()}

    def replaced(found: re.Match[str]) -> str:
        image, words, link, anchor = found.groups(default="")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        own = pages.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if own is None:
            return words
        return f"{image}[{words}]({posixpath.relpath(own, posixpath.dirname(page) or '.')}{anchor})"

    return LINK.sub(replaced, text)


def reference() -> str:
    """The page of the public names, which mkdocstrings fills from their docstrings."""
    lines = ["# Reference", "", "Every public name, from its docstring: shapes, units, errors and source.", ""]
    classes = {
        name: each
        for name, each in sorted(vars(hf_denseseg).items())
        if isinstance(each, type) and name in hf_denseseg.__all__
    }
    for title in dict.fromkeys([*FUNCTIONS, *MORE]):
        lines += [f"## {title}", ""]
        for name in FUNCTIONS.get(title, ()):
            lines += [f"::: {getattr(hf_denseseg, name).__module__}.{name}", ""]
        for name in MORE.get(title, ()):
            lines += [f"::: {name}", *(["    options: {inherited_members: true}"] if name == INHERITING else []), ""]
    for family in registration.families():
        lines += [f"## {paper_of(family)['name']}", ""]
        outputs = vars(registration.family_module(family, "modeling")).values()
        own = [each for each in classes.values() if f".models.{family}." in each.__module__]
        own += [
            each for each in outputs if getattr(each, "__name__", "").endswith("Output") and family in each.__module__
        ]
        lines += [line for each in own for line in (f"::: {each.__module__}.{each.__name__}", "")]
    return "\n".join(lines)
