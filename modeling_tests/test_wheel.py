"""The wheel and the source distribution are whole: what a checkout can do, an installed package can."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from reference import REPOSITORY

WITHOUT_CHECKOUT = """
import sys
from pathlib import Path
import hf_denseseg
assert Path(hf_denseseg.__file__).is_relative_to(sys.argv[1]), hf_denseseg.__file__
from hf_denseseg.ops.kernel_paths import BUILD, SOURCE
assert SOURCE.is_relative_to(sys.argv[1]) and BUILD.is_relative_to(sys.argv[2])
"""


def build(kind: str, source: Path, output: Path) -> Path:
    """Build a distribution; returns the file."""
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", output], cwd=source, check=True)
    return next(output.iterdir())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", REPOSITORY, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Folder of the unpacked wheel, a cache, and an environment with this package and the dependencies from here."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    # The folders of the path are searched as they are: the link to this checkout, a file of this environment, is not.
    path = os.pathsep.join([str(folder), *(each for each in sys.path if each.endswith("site-packages"))])
    cache = tmp_path_factory.mktemp("cache")
    environment = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    return folder, cache, environment


def run(installed, *words: object) -> str:
    folder, cache, environment = installed
    python = getattr(sys, "_base_executable", sys.executable)
    done = subprocess.run(
        [python, *map(str, words)], env=environment, cwd=cache, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_source_distribution_gives_the_same_wheel(wheel, tmp_path):
    archive = build("sdist", REPOSITORY, tmp_path / "sdist")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    again = build("wheel", tmp_path / archive.name.removesuffix(".tar.gz"), tmp_path / "wheel")
    names = [set(zipfile.ZipFile(each).namelist()) for each in (wheel, again)]
    assert names[0] == names[1]
    assert "hf_denseseg/ops/ms-deform-attn/build.toml" in names[0] and "denseseg_command.py" in names[0]
    assert not [name for name in names[0] if "__pycache__" in name or "/tests/" in name or name.endswith(".so")]


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    tracked = subprocess.run(
        ["git", "ls-files", "src/hf_denseseg"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.split()
    if not tracked:
        pytest.skip("not a checkout of git")
    assert {name.removeprefix("src/") for name in tracked} <= set(zipfile.ZipFile(wheel).namelist())


def test_installed_package_runs_outside_a_checkout(installed):
    folder, cache, _ = installed
    run(installed, "-c", WITHOUT_CHECKOUT, folder, cache)
    assert "Train, evaluate and use" in run(installed, "-c", "import denseseg_command as c; c.main()", "--help")


def test_the_ten_lines_of_the_readme_run_outside_a_checkout(installed):
    (lines,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    assert "sky (640, 427)" in run(installed, "-c", lines)


@pytest.mark.slow
def test_installed_package_builds_the_kernel_in_the_cache_of_the_user(installed):
    run(installed, "-m", "hf_denseseg.cli", "kernels", "build")
    assert "compiled" in run(installed, "-m", "hf_denseseg.cli", "kernels", "info").split("\n")[2]
    assert list(installed[1].glob("hf_denseseg/ms-deform-attn/*/metadata.json"))


@pytest.mark.slow
def test_platform_wheel_brings_the_kernel_built(tmp_path):
    environment = {**os.environ, "DENSESEG_WHEEL_KERNEL": "1"}
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "wheel"]
    subprocess.run(command, cwd=REPOSITORY, check=True, env=environment)
    (wheel,) = (tmp_path / "wheel").iterdir()
    assert not wheel.name.endswith("any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "package")
    path = os.pathsep.join([str(tmp_path / "package"), *(each for each in sys.path if each.endswith("site-packages"))])
    found = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    report = run((tmp_path, tmp_path, found), "-m", "hf_denseseg.cli", "kernels", "info")
    assert "compiled" in report.split("\n")[2] and str(tmp_path / "package") in report
