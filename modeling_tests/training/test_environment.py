"""What `results.json` says of code and machine: the commit asked of git, the machine told in a phrase."""

import subprocess

import pytest

from hf_denseseg.reports.rendering import environment_of
from hf_denseseg.training.environment import checked_out_commit


def git(folder, *words):
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *author, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path):
    """A repository with one package, committed."""
    package = tmp_path / "repository" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(package, "init", "--quiet")
    git(package, "add", ".")
    git(package, "commit", "--quiet", "-m", "first")
    return package


def test_a_checkout_names_its_commit_and_whether_files_differ(checkout):
    commit = git(checkout, "rev-parse", "HEAD").strip()
    git(checkout, "tag", "v1")  # names of tags and branches may move
    (checkout / "notes.txt").write_text("git does not track this")
    assert checked_out_commit(checkout) == commit
    (checkout / "__init__.py").write_text("changed = True")
    assert checked_out_commit(checkout) == f"{commit}-dirty"


def test_an_installed_package_has_no_commit_even_inside_a_repository(checkout, tmp_path, monkeypatch):
    installed = checkout / ".venv" / "site-packages" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert checked_out_commit(installed) is None
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "alone").mkdir()
    assert checked_out_commit(tmp_path / "alone") is None
    monkeypatch.setenv("PATH", "")  # no git
    assert checked_out_commit(checkout) is None


@pytest.mark.parametrize(
    "accelerator, threads, processes, expected",
    [
        (None, 2, 1, "P, 2 threads"),
        (None, 1, 4, "4 x P, 1 thread"),
        ("NVIDIA H200", 16, 1, "NVIDIA H200"),
        ("NVIDIA H200", 16, 8, "8 x NVIDIA H200"),
    ],
)
def test_the_machine_in_a_phrase(accelerator, threads, processes, expected):
    found = {"processor": "P", "accelerator": accelerator, "threads": threads, "processes": processes}
    versions = {"torch": "2.14", "python": "3.12"}
    assert environment_of({"versions": versions, "machine": found}) == f"torch 2.14, python 3.12; {expected}"
    assert environment_of({"versions": versions}) == "torch 2.14, python 3.12"  # of an older run
