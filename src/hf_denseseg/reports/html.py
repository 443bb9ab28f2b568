"""Self-contained HTML pages: one autoescaping template environment, and images embedded as data URIs."""

import base64
import io
from pathlib import Path

import jinja2
from PIL import Image

from hf_denseseg.reports.class_table import percent

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["percent"] = percent


def render(template: str, **values: object) -> str:
    """Fill in a template of this folder, such as `"run_page"`; every value is escaped."""
    return _ENVIRONMENT.get_template(f"{template}.html.jinja").render(**values)


def image_uri(image: bytes | Image.Image, kind: str) -> str:
    """The `src` that embeds an image in a page.

    Args:
        image: content of a file, or an image that is encoded first.
        kind: `"png"` or `"jpeg"`.
    """
    if isinstance(image, Image.Image):
        data = io.BytesIO()
        image.save(data, kind, quality=85, optimize=True)
        image = data.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
