"""Files of a Space with the page of a checkpoint, and of an inference endpoint."""

from huggingface_hub import SpaceCard, SpaceCardData

GRADIO_VERSION = "6.31.0"  # that the Space runs
REQUIREMENTS = "hf-denseseg{extra}\n"
APP = '''"""The page of {repository}; the same as `denseseg serve {repository}`."""

from hf_denseseg.inference.serving.app import launch

launch("{repository}", title="{title}")
'''
HANDLER = '''"""Inference endpoints of the hub call this class, see `hf_denseseg.inference.serving.endpoint`."""

from hf_denseseg.inference.serving.endpoint import EndpointHandler

__all__ = ["EndpointHandler"]
'''
ABOUT = """
# {title}

The page of [{repository}](https://huggingface.co/{repository}): upload an image, see mask, overlay and table.
`denseseg push --space` wrote it; `denseseg serve {repository}` opens the same page on your machine.
"""


def endpoint_files() -> dict[str, str]:
    """File names and texts that an endpoint needs beside the model."""
    return {"handler.py": HANDLER, "requirements.txt": REQUIREMENTS.format(extra="")}


def space_files(repository: str, license: str | None = None) -> dict[str, str]:
    """File names and texts of a Space that shows the model of the same name.

    Args:
        repository: `OWNER/NAME` of the model.
        license: of the model, as in its card.
    """
    title = repository.rpartition("/")[2]
    data = SpaceCardData(
        title=title,
        license=license,
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        app_file="app.py",
        models=[repository],
        tags=["image-segmentation", "hf-denseseg"],
    )
    card = SpaceCard(f"---\n{data.to_yaml()}\n---\n{ABOUT.format(title=title, repository=repository)}")
    return {
        "app.py": APP.format(repository=repository, title=title),
        "requirements.txt": REQUIREMENTS.format(extra="[app]"),
        "README.md": str(card),
    }


__all__ = ["endpoint_files", "space_files"]
