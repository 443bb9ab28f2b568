"""The pages of the site: every link points to a page of it, and the reference names what is public."""

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
PAGES |= {source: page for page, source in site_hooks.ELSEWHERE.items()}


@pytest.mark.parametrize("source", PAGES)
def test_links_of_a_page_stay_in_the_site(source):
    page, text = PAGES[source], (REPOSITORY / source).read_text()
    linked = site_hooks.relink(text, source, page)
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", linked):
        place = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        assert place in PAGES.values() or (REPOSITORY / "docs" / place).exists(), target
    code = re.findall(r"```.*?```", text, flags=re.DOTALL)
    assert all(block in linked for block in code)


def test_links_that_lead_out_become_text():
    text = "[the\ncard](../model_cards/a.md), [data](data.md#x), ![i](images/demo.png), `a[0]`"
    expected = "the\ncard, [data](data.md#x), ![i](images/demo.png), `a[0]`"
    assert site_hooks.relink(text, "docs/training.md", "training.md") == expected
    assert site_hooks.relink("[k](docs/data.md)", "README.md", "index.md") == "[k](data.md)"
    hlg = "[m](../../../../docs/measured.md)"
    assert site_hooks.relink(hlg, "src/hf_denseseg/models/hlg/README.md", "papers/hlg.md") == "[m](../measured.md)"


def test_reference_holds_every_public_name():
    named = {line.rpartition(".")[2] for line in site_hooks.reference().splitlines() if line.startswith(":::")}
    assert set(hf_denseseg.__all__) <= named


def test_navigation_names_every_page():
    nav = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]
    found = set(re.findall(r"[\w/]+\.md", str(nav)))
    assert found == {*PAGES.values(), "reference.md"}
