"""The `denseseg` command line: one subcommand per step from recipe to model card."""

import argparse
import errno
import importlib
import importlib.metadata
import logging
import os
import sys

from hf_denseseg.errors import InputError, RunError

COMMANDS = (
    "demo",
    "models",
    "data",
    "train",
    "evaluate",
    "predict",
    "features",
    "convert",
    "export",
    "card",
    "push",
    "kernels",
)
EPILOG = """examples:
  denseseg demo                                              train a small model on embedded data, offline
  denseseg models 'dsct-*'                                   names, sizes and costs
  denseseg train scripts/recipes/dsct/dsct_tiny_sac_camvid_cpu.yaml --dataset path/to/camvid
  denseseg predict runs/demo/model street.jpg --output_dir masks

exit codes: 0 done, 1 failed while running, 2 wrong input or usage"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each module of `commands` adds its own."""
    parser = argparse.ArgumentParser(
        prog="denseseg",
        description="Train, evaluate and use dense-prediction models for Hugging Face transformers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf-denseseg {_version()}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"hf_denseseg.commands.{name}").add_parser(subparsers)
    return parser


def parse_arguments(words: list[str]) -> argparse.Namespace:
    """Parse a command line; options that a command does not define go to `overrides`, if it takes recipe keys.

    A key takes all words up to the next `--`, so positional arguments come first.
    """
    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices
    chosen = commands.get(words[0]) if words else None
    own, overrides = list(words), list[str]()
    if chosen is not None and chosen.get_default("takes_overrides"):
        own.clear()
        part = own
        for word in words:
            if word.startswith("--"):
                part = own if word.split("=")[0] in chosen._option_string_actions else overrides
            part.append(word)
    args = parser.parse_args(own)
    args.overrides = overrides
    return args


def _version() -> str:
    # From the installed metadata: the package itself may not be loaded yet, see `denseseg_command`.
    try:
        return importlib.metadata.version("hf-denseseg")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def main(argv: list[str] | None = None) -> int:
    """Run one command line, by default that of this process, and return its exit code."""
    return run(parse_arguments(sys.argv[1:] if argv is None else argv))


def run(args: argparse.Namespace) -> int:
    """Run the command that `parse_arguments` found and return its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # Their messages of level INFO are of no use to a user.
    for library in ("httpx", "httpcore", "filelock", "fsspec", "PIL", "matplotlib", "datasets", "urllib3"):
        logging.getLogger(library).setLevel(logging.WARNING)
    command = importlib.import_module(f"hf_denseseg.commands.{args.command}")
    try:
        code = command.main(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, for example `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(
            f"failed: the disk is full ({error.filename}). Free some space and run the command again.", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue from the last checkpoint.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
