"""The look that all pages of a run share, and their parts; a page is one file that needs no other."""

import base64
import html

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c }
h1 { margin-bottom: 0 } .note { color: #666 }
.numbers { display: flex; gap: 1rem; flex-wrap: wrap; margin: 1.5rem 0 }
.numbers div { background: #f3f4f6; border-radius: .6rem; padding: .8rem 1.4rem }
.numbers b { display: block; font-size: 1.8rem }
img { max-width: 100%; border-radius: .4rem } table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #e5e7eb }
td.bar { width: 45% } td.bar div { height: .9rem; border-radius: .2rem }
.swatch { display: inline-block; width: .9rem; height: .9rem; border-radius: .2rem; margin-right: .5rem }
pre { background: #f3f4f6; padding: 1rem; border-radius: .6rem; overflow-x: auto }
"""


def whole_page(title: str, body: str) -> str:
    """A page with this title (plain text) and body (HTML)."""
    name = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>\n'
        f"<h1>{name}</h1>\n{body}</html>\n"
    )


def number_boxes(numbers: list[tuple[str, str]]) -> str:
    """Headline figures as (label, value)."""
    boxes = "".join(f"<div>{html.escape(label)}<b>{html.escape(value)}</b></div>" for label, value in numbers)
    return f'<div class="numbers">{boxes}</div>'


def embedded(data: bytes, kind: str, description: str) -> str:
    """A picture file of `kind` (`"png"`, `"jpeg"`) inside the page."""
    code = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/{kind};base64,{code}">'


def color_style(color: tuple[int, int, int]) -> str:
    """The colour of a class as a style."""
    red, green, blue = color
    return f"background: rgb({red}, {green}, {blue})"


def class_name(name: str, color: tuple[int, int, int]) -> str:
    """A class with its colour before it."""
    return f'<span class="swatch" style="{color_style(color)}"></span>{html.escape(name)}'


def percent(value: float | None, width: int = 0) -> str:
    """A fraction in percent with two places, right-aligned; a dash for None."""
    return f"{'–' if value is None else f'{100 * value:.2f}':>{width}}"
