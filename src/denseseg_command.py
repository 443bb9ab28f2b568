"""The `denseseg` command: read the command line first, load torch and the model families only to run it.

`import hf_denseseg` registers every family with the Auto classes and so imports torch and transformers, which takes
seconds. `denseseg --help` and a misspelled option need none of it. This module stands outside the package, so that it
can be imported alone: it makes the package known without running its `__init__`, parses, and runs it then.
"""

import importlib.util
import sys


def main() -> int:
    """Run the command line of this process and return its exit code."""
    spec = importlib.util.find_spec("hf_denseseg")
    assert spec is not None and spec.loader is not None, "installed beside this module"
    package = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    from hf_denseseg.cli import parse_arguments, run

    args = parse_arguments(sys.argv[1:])
    spec.loader.exec_module(package)  # registers the families
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
