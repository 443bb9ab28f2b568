"""Results that grow: a command adds to what earlier ones measured; not a benchmark itself."""

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def earlier_figures(args: argparse.Namespace) -> dict[str, Any]:
    """The figures in the file that this command will write; {} if there is none yet."""
    path = args.output or RESULTS / f"{args.name}.json"
    return json.loads(path.read_text())["figures"] if path.exists() else {}
