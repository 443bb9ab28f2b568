"""Run the notebooks of docs/notebooks/ again and write their outputs into them.

python scripts/notebooks.py                  # all
python scripts/notebooks.py export kernel    # some, by name
"""

import argparse
import hashlib
import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "notebooks"
# Of the processes that run a notebook: its commands are those of this environment, nothing is downloaded, and no
# progress bars are kept, nor tqdm's warning that there are no widgets for them.
ENVIRONMENT = {
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    "PYTHONWARNINGS": "ignore:IProgress not found",
    "TQDM_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}


def source_hash(cells: list[Any]) -> str:
    """A checksum of the sources, by which a test finds a notebook that was edited after it was run."""
    texts = [each["source"] if isinstance(each["source"], str) else "".join(each["source"]) for each in cells]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def executed(path: Path) -> Any:
    """A notebook with new outputs; it ran in an empty folder, with the commands of this environment, offline.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=1800, startup_timeout=300, resources={"metadata": {"path": folder}})
        client.execute(env=os.environ | ENVIRONMENT)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
        for output in cell.get("outputs", ()):
            keep_smaller_image(output.get("data", {}))
            if "text" in output:
                output["text"] = output["text"].replace(f"{ROOT}/", "")
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "source_hash": source_hash(notebook.cells),
    }
    return notebook


def joined(outputs: list[Any]) -> list[Any]:
    """Outputs in which what was printed in pieces is one text."""
    found: list[Any] = []
    for output in outputs:
        if found and output["output_type"] == "stream" and found[-1].get("name") == output["name"]:
            found[-1]["text"] += output["text"]
        else:
            found.append(output)
    return found


def keep_smaller_image(data: dict[str, Any]) -> None:
    """Pillow shows an image as PNG and as JPEG; photographs are smaller as JPEG, drawings as PNG."""
    if {"image/png", "image/jpeg"} <= data.keys():
        del data[max(("image/png", "image/jpeg"), key=lambda kind: len(data[kind]))]
        data["text/plain"] = re.sub(r" at 0x\w+", "", data["text/plain"])


def main() -> None:
    names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(names)} (default: all)")
    args = parser.parse_args()
    if unknown := set(args.names) - set(names):
        parser.error(f"there is no notebook {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    import nbformat

    for name in args.names or names:
        path = FOLDER / f"{name}.ipynb"
        nbformat.write(executed(path), path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1024:.0f} KiB", flush=True)


if __name__ == "__main__":
    main()
