"""The pages of the site: every link points to a page of it, and the reference names what is public."""

import importlib
import inspect
import posixpath
import re
import sys

import pytest
import yaml

import hf_denseseg
from reference import REPOSITORY

sys.path.append(str(REPOSITORY / "scripts"))
import site_hooks  # noqa: E402 - a script

PAGES = {f"docs/{path.name}": path.name for path in (REPOSITORY / "docs").glob("*.md")}
REFERENCE = [line.split()[1] for line in site_hooks.reference().splitlines() if line.startswith(":::")]
PAGES |= {source: page for page, source in site_hooks.ELSEWHERE.items()}


@pytest.mark.parametrize("source", PAGES)
def test_links_of_a_page_stay_in_the_site(source):
    page, text = PAGES[source], site_hooks.text_of(source)
    linked = site_hooks.relink(text, source, page)
    for target in re.findall(r"\]\((?!https?://|#|data:)([^)#]+)", linked):
        place = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        found = place in PAGES.values() or place in site_hooks.IMAGES or (REPOSITORY / "docs" / place).exists()
        assert found, target
    code = re.findall(r"```.*?```", text, flags=re.DOTALL)
    assert all(block in linked for block in code)


def test_notebooks_are_pages_with_their_outputs():
    page = site_hooks.text_of("docs/notebooks/export.ipynb")
    assert "```bash\ndenseseg export model --format onnx" in page and "%%bash" not in page
    assert "```text\n(1, 11, 86, 128)" in page and "![output](data:image/jpeg;base64,/9j/" in page
    relinked = site_hooks.relink("[e](notebooks/export.ipynb)", "docs/notebooks.md", "notebooks.md")
    assert relinked == "[e](notebooks/export.md)"


def test_links_that_lead_out_become_text():
    text = "[the\ncard](../model_cards/a.md), [data](data.md#x), ![i](images/example.jpg), `a[0]`"
    expected = "the\ncard, [data](data.md#x), ![i](images/example.jpg), `a[0]`"
    assert site_hooks.relink(text, "docs/training.md", "training.md") == expected
    assert site_hooks.relink("[k](docs/data.md)", "README.md", "index.md") == "[k](data.md)"
    hlg = "[m](../../../../docs/measured.md)"
    assert site_hooks.relink(hlg, "src/hf_denseseg/models/hlg/README.md", "papers/hlg.md") == "[m](../measured.md)"


def test_images_from_elsewhere_are_files_of_the_site():
    for page, file in (("README.md", "index.md"), ("docs/experiments.md", "experiments.md")):
        linked = site_hooks.relink(site_hooks.text_of(page), page, file)
        assert re.search(r"!\[[^]]+\]\(images/leaderboard_camvid.png\)", linked), page
    assert all((REPOSITORY / source).exists() for source in site_hooks.IMAGES.values())


def test_reference_holds_every_public_name():
    named = {name.rpartition(".")[2] for name in REFERENCE}
    assert set(hf_denseseg.__all__) <= named


def public(name):
    """What a name of the reference stands for."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", REFERENCE)
def test_a_public_name_says_what_it_takes_and_returns(name):
    """Every parameter of a function, and of the `forward` of a model with a head, and what comes back."""
    found = public(name)
    is_head = inspect.isclass(found) and "For" in found.__name__ and hasattr(found, "forward")
    function = found.forward if is_head else found
    documented = inspect.getdoc(function) or ""
    assert documented
    if inspect.isfunction(function):
        signature = inspect.signature(function)
        missing = [
            each for each in signature.parameters if each not in ("self", "kwargs") and each + ":" not in documented
        ]
        assert not missing, missing
        assert "Returns:" in documented or signature.return_annotation in (None, "None")


def test_navigation_names_every_page():
    nav = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]
    found = set(re.findall(r"[\w/]+\.md", str(nav)))
    linked = ("cards/", "notebooks/")  # by zoo.md and notebooks.md
    assert found == {page for page in PAGES.values() if not page.startswith(linked)} | {"reference.md"}
