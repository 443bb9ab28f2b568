"""`denseseg serve`: a local page on which a checkpoint can be tried."""

import argparse
from pathlib import Path

EPILOG = """examples:
  denseseg serve runs/demo/model
  denseseg serve your-name/dsct-demo --examples street1.jpg street2.jpg --port 8080

Needs `pip install 'hf-denseseg[app]'` (Gradio). The page is for this machine only; --host 0.0.0.0 opens it to the
network.

The same page as a Space of the hub: `denseseg push FOLDER OWNER/NAME --space`."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `serve` to the command line."""
    parser = subparsers.add_parser(
        "serve",
        help="open a local page on which a checkpoint can be tried",
        description="Open a page for a checkpoint: upload an image, see mask, overlay and table.",
        epilog=EPILOG,
    )
    parser.add_argument("checkpoint", help="model folder, exported model or hub id")
    parser.add_argument(
        "--examples", nargs="+", default=[], metavar="IMAGE", help="images that the page offers (default: none)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if available)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, metavar="N", help="port (default: the first free one from 7860)")


def main(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from hf_denseseg.errors import InputError
    from hf_denseseg.inference.serving.app import launch

    if missing := [path for path in args.examples if not Path(path).is_file()]:
        raise InputError(f"--examples {missing[0]} is no file. Give paths of images.")
    launch(
        args.checkpoint,
        examples=args.examples,
        device=args.device,
        server_name=args.host,
        server_port=args.port,
        allowed_paths=args.examples,
    )
    return 0
