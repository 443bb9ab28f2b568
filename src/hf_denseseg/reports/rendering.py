"""Templates of pages and cards: one environment that escapes HTML, and images embedded as data URIs; CSV tables."""

import base64
import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from hf_denseseg.reports.class_table import percent

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=lambda name: name is not None and name.endswith(".html.jinja"),  # cards are Markdown
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["percent"] = percent


def render(template: str, **values: object) -> str:
    """Fill in a template of this folder, such as `"run_page.html"`; in HTML every value is escaped.

    Raises:
        jinja2.UndefinedError: the template uses a value that is not given.
    """
    return _ENVIRONMENT.get_template(f"{template}.jinja").render(**values)


def environment_of(results: dict[str, Any]) -> str:
    """Versions and machine of a `results.json`: "torch 2.14, …; 4 x NVIDIA H200", or "…; AMD EPYC, 2 threads"."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    if "machine" not in results:  # of a run before there was this entry
        return versions
    found = results["machine"]
    count = f"{found['processes']} x " if found["processes"] > 1 else ""
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    return f"{versions}; {count}{found['accelerator'] or found['processor'] + ', ' + threads}"


def csv_text(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The content of a CSV file; None is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    return text.getvalue()


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
