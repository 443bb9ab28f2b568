"""The `denseseg` command line: one subcommand per step from recipe to model card."""

import argparse
import errno
import importlib
import importlib.metadata
import logging
import os
import sys
from typing import Any

from hf_denseseg.commands.help_format import HelpFormatter
from hf_denseseg.errors import InputError, RunError, unknown_name

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
    "serve",
    "kernels",
)
# Options that had another name: refused with the new one, where the command has it.
RENAMED_OPTIONS = {
    "--output": "--output_dir",
    "--every": "--frame_stride",
    "--band_pixels": "--tile_above_pixels",
} | {f"--{key}": f"--test_{key}" for key in ("mode", "crop_size", "stride", "base_size", "scales", "flip", "average")}
EPILOG = """examples:
  denseseg demo              train a small model on embedded data, offline
  denseseg models 'dsct-*'   names, sizes and costs
  denseseg train scripts/recipes/dsct/dsct_tiny_sac_camvid_cpu.yaml --dataset path/to/camvid
  denseseg predict runs/demo/model street.jpg --output_dir masks

exit codes: 0 done, 1 failed while running, 2 wrong input or usage"""


class CommandParser(argparse.ArgumentParser):
    """A parser that takes options by their full names only: an abbreviation could mean another option tomorrow."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"allow_abbrev": False, "formatter_class": HelpFormatter})

    def check_options(self, words: list[str]) -> None:
        """End with a usage error at the first of `words` that is no option, and propose the one that was meant."""
        known = self.option_names()
        for word in words[: words.index("--") if "--" in words else None]:
            option = word.split("=")[0]
            if option.startswith("--") and option not in known:
                renamed = RENAMED_OPTIONS.get(option)
                if renamed in known:
                    self.error(f"{option} has another name now. Did you mean {renamed!r}?")
                self.error(unknown_name("option", option, known, f"See {self.prog} --help."))

    def option_names(self) -> set[str]:
        """The options of this parser and of its subcommands."""
        names = set(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                names.update(*(parser.option_names() for parser in action.choices.values()))
        return names


def build_parser() -> CommandParser:
    """The parser of all subcommands; each module of `commands` adds its own."""
    parser = CommandParser(
        prog="denseseg",
        description="Train, evaluate and use dense-prediction models for Hugging Face transformers.",
        epilog=EPILOG,
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
    if chosen is not None:
        chosen.check_options(own[1:])
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
    for library in (
        *("httpx", "httpcore", "filelock", "fsspec", "PIL", "matplotlib", "datasets", "urllib3"),
        *("onnxscript", "onnx_ir"),
    ):
        logging.getLogger(library).setLevel(logging.WARNING)
    command = importlib.import_module(f"hf_denseseg.commands.{args.command}")
    if not sys.stderr.isatty():  # ours are off there too
        importlib.import_module("transformers.utils.logging").disable_progress_bar()
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
