"""Figures in the sentences of the pages of experiments are those of the results, which change when runs are added."""

import json
import re
import statistics

import pytest

from reference import REPOSITORY

RESULTS = REPOSITORY / "scripts" / "results"
EXPERIMENTS, GUIDANCE = (REPOSITORY / "docs" / f"{name}.md" for name in ("experiments", "guidance"))


def sentence(page, pattern):
    """What the groups of a pattern, whose words may be wrapped anywhere, find in a page."""
    found = re.search(pattern.replace(" ", r"\s+"), page.read_text())
    assert found, f"{page.name} no longer says {pattern!r}"
    return found.groups()


def camvid(name):
    return 100 * json.loads((RESULTS / "dsct_tiny_sac_camvid_cpu" / name).read_text())["scores"]["mean_iou"]


def gains(file, arm, base):
    rows = json.loads((RESULTS / file).read_text())["rows"]
    own, other = ({run["seed"]: run["mean_iou_percent"] for run in rows[name]["runs"]} for name in (arm, base))
    return [own[seed] - other[seed] for seed in sorted(own)]


def test_half_size_without_training():
    full, half = sentence(EXPERIMENTS, r"scores ([\d.]+) on them and ([\d.]+) on the same images at half their size")
    assert full == f"{camvid('results_full_size.json'):.1f}" == f"{camvid('results_full_size_amd.json'):.1f}"
    assert half == f"{camvid('results_full_size_tested_at_half.json'):.1f}"


def test_the_recipe_from_random_weights():
    files = ["results.json", *(f"results_seed_{seed}.json" for seed in range(1, 5))]
    scores = [camvid(name) for name in files]
    mean, spread, old = sentence(
        EXPERIMENTS, r"reaches ([\d.]+) ± ([\d.]+) \(five seeds\), where the old one had ([\d.]+)"
    )
    assert (mean, spread) == (f"{statistics.mean(scores):.1f}", f"{statistics.stdev(scores):.1f}")
    assert old == f"{camvid('results_full_size.json'):.1f}"


def test_scatter_of_the_old_recipe():
    (scatter,) = sentence(EXPERIMENTS, r"Three seeds of the recipe scatter by ([\d.]+) points")
    rows = json.loads((RESULTS / "leaderboard" / "camvid_from_scratch.json").read_text())["rows"]
    assert scatter == f"{statistics.stdev(run['mean_iou_percent'] for run in rows['the recipe']['runs']):.1f}"


@pytest.mark.parametrize("change", ["photometric distortion", "scales up to 2"])
def test_changes_that_lost_with_every_seed(change):
    (named,) = sentence(EXPERIMENTS, r"(Photometric distortion and scales up to 2) lost with every seed")
    assert change in named.lower()
    assert max(gains("leaderboard/camvid_from_scratch.json", change, "the recipe")) < 0


def test_guidance_with_a_finer_teacher():
    file = "guidance/camvid_lite0_200_steps.json"
    (teacher,) = sentence(GUIDANCE, r"The FCN then is no longer behind SemanticFPN \((\S+) points, three")
    base = "SemanticFPN, images doubled"
    assert teacher == f"{statistics.mean(gains(file, 'FCN, images doubled', base)):+.1f}"
    seeds = sentence(GUIDANCE, r"and the guided arm is not either: (\S+), (\S+) and (\S+) seed by seed")
    assert list(seeds) == [f"{each:+.1f}" for each in gains(file, "full HFGM, images doubled", base)]
