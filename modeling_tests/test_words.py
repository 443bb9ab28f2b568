"""The words of the field: what `docs/structure.md` names once is called the same everywhere.

Names of datasets, of other libraries and of keys that older files still hold are left out, each by its line.
"""

import re

import pytest

from reference import REPOSITORY

# What is not written -> what is.
WORDS = {
    r"pictures?": "image",
    r"answers?|answered|Answerer": "prediction",
    r"(?<!ground )(?<!ground-)truths?": "ground truth",
    r"licen[c]e[ds]?": "license",
    r"data[ -]sets?": "dataset",
    r"mirror(ed|s)?": "horizontal flip, flipped",
    r"anew": "again",
    r"commonest": "most common",
    r"likeness": "similarity",
    r"remed(y|ies)|mend(s|ed)?": "fix",
    r"colours?|coloured": "color",
    r"grey": "gray",
    r"drop-out": "dropout",
    r"up-sampling": "upsampling",
    r"labeller|labelled": "predictor, predicted; labeled",
    r"literal": "reference implementation",
    r"look(s|ed)? (at|inside)": "inspect, run on",
}
# Lines that may hold one: names of others, and what older files hold.
ALLOWED = re.compile(
    r"typing|Literal|literal_eval|ast\.|pictures_per_step|RENAMED|max_class_ratio|guided_config|\"licence\"|'licence'|"
    r"look_|lookup|PASCAL|answers? to|ground_truth"
)
FILES = sorted(
    path
    for pattern in (
        "src/**/*.py",
        "src/**/*.md",
        "src/**/*.yaml",
        "src/**/*.jinja",
        "scripts/**/*.py",
        "scripts/recipes/**/*.yaml",
        "docs/*.md",
    )
    for path in REPOSITORY.glob(pattern)
    if path.name != "measures.py"  # counts them
)


@pytest.mark.parametrize("word", WORDS)
def test_the_field_s_words_are_used(word):
    found = []
    for path in (*FILES, REPOSITORY / "README.md", *(REPOSITORY / "model_cards").glob("*.md")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(rf"(?i)(?<![\w])({word})(?![\w])", line) and not ALLOWED.search(line):
                found.append(f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()[:100]}")
    assert not found, f"write {WORDS[word]}:\n" + "\n".join(found[:20])
