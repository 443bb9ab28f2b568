"""What must hold before a release: versions agree, wheel and source distribution are whole, pages are up to date.

python scripts/release_check.py    # or `make release-check`; publishes nothing
"""

import filecmp
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path

import yaml

import hf_denseseg

ROOT = Path(__file__).resolve().parents[1]


def versions() -> str | None:
    """What is wrong with the versions, or None."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    others = {"hf_denseseg.__version__": hf_denseseg.__version__, "CITATION.cff": cited}
    if wrong := [f"{name} {other}" for name, other in others.items() if other != version]:
        return f"pyproject.toml has {version}, but {', '.join(wrong)}"
    heading = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    return None if heading.startswith(f"## {version}") else f"CHANGELOG.md begins with {heading!r}, not with {version}"


def run(*words: str) -> str | None:
    """The output of a command that failed, or None."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stdout + done.stderr).strip()


def distributions() -> str | None:
    """Build both and let twine check their metadata."""
    with tempfile.TemporaryDirectory() as folder:
        failed = run("-m", "hatchling", "build", "-d", folder)
        return failed or run("-m", "twine", "check", "--strict", *map(str, sorted(Path(folder).iterdir())))


def figures() -> str | None:
    """README and docs have the figures of the result files."""
    failed = run("scripts/update_figures.py", "--check")
    return None if failed is None else "a page is not up to date: python scripts/update_figures.py"


def cards() -> str | None:
    """The model cards are those that the command writes now."""
    with tempfile.TemporaryDirectory() as folder:
        if failed := run("-m", "hf_denseseg.cli", "card", "--output_dir", folder):
            return failed
        written = {path.name for path in Path(folder).glob("*.md")}
        _, different, missing = filecmp.cmpfiles(ROOT / "model_cards", folder, sorted(written), shallow=False)
    wrong = [*different, *missing]
    return f"{', '.join(wrong)} not up to date: denseseg card" if wrong else None


CHECKS: dict[str, Callable[[], str | None]] = {
    "versions and changelog": versions,
    "wheel and source distribution": distributions,
    "figures": figures,
    "model cards": cards,
}


def main() -> int:
    failed = 0
    for name, check in CHECKS.items():
        problem = check()
        failed += problem is not None
        print(f"{name}: {'ok' if problem is None else problem}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
