"""`denseseg export`: a checkpoint as one `torch.export` file, written only if it agrees with the model."""

import argparse
from pathlib import Path

TOLERANCE = 1e-3

EPILOG = """examples:
  denseseg export runs/demo/model --output demo.pt2
  denseseg export runs/dpt/model --output dpt.pt2 --size 384 384
  python -c 'import torch; model = torch.export.load("demo.pt2").module(); print(model(torch.zeros(1, 3, 256, 320)))'

The program takes normalized pixel_values (batch, 3, height, width) of any size from 29 pixels up and returns the
logits. torch 2.11 exports pooling for even or for odd sizes only; the command then says so and writes nothing."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `export` to the command line."""
    parser = subparsers.add_parser(
        "export",
        help="write a checkpoint as a torch.export program",
        description="Export with dynamic batch, height and width, and compare with the model at three sizes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="model folder or hub id")
    parser.add_argument("--output", required=True, help="file to write, ending in .pt2")
    text = "of the only images that the program takes, for models of one size (default: any size)"
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help=text)


def main(args: argparse.Namespace) -> int:
    """Export, verify, save."""
    import torch
    from torch.export import Dim

    from hf_denseseg.errors import InputError, RunError
    from hf_denseseg.files import atomic_path
    from hf_denseseg.models.auto.pretrained import load_trained_model
    from hf_denseseg.models.channels import image_channels

    if Path(args.output).suffix != ".pt2":
        raise InputError(f"--output {args.output}: give a file that ends in .pt2, the ending of torch.export.")

    class Logits(torch.nn.Module):
        """Tensors in, tensor out."""

        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.model(pixel_values=pixel_values).logits

    if args.size and min(args.size) < 1:
        raise InputError(f"--size {args.size[0]} {args.size[1]}: give height and width in pixels.")
    trained = load_trained_model(args.checkpoint)
    program, channels = Logits(trained).eval(), image_channels(trained.config)
    # A batch of 2: torch.export makes constants of sizes 0 and 1.
    size, free = (args.size, ()) if args.size else ((128, 160), (2, 3))
    dynamic = dict.fromkeys((0, *free), Dim.AUTO)
    try:
        exported = torch.export.export(program, (torch.zeros(2, channels, *size),), dynamic_shapes=(dynamic,))
    except Exception as error:  # the kinds are open-ended: the model's own code at this size, or torch's exporter
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        name = type(program.model).__name__
        which = f"{size[0]}x{size[1]} pixels" if args.size else "any size"
        fix = "" if args.size else " Give --size if it has one size only."
        raise RunError(
            f"{name} cannot be exported for images of {which} ({reason}); nothing was written.{fix}"
        ) from error
    module = exported.module()
    sizes = [size] * 3 if args.size else [(96, 128), size, (161, 97)]
    for shape in [(batch, channels, *each) for batch, each in enumerate(sizes, 1)]:
        pixel_values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                difference = (module(pixel_values) - program(pixel_values)).abs().max().item()
        except AssertionError as error:
            raise RunError(
                f"torch {torch.__version__} exports this model for some sizes only ({error}); nothing was written. "
                "Give --size for one size; a newer torch may export all."
            ) from error
        print(f"batch {shape[0]}, {shape[2]}x{shape[3]}: largest difference {difference:.1e}")
        if not difference <= TOLERANCE:
            raise RunError(f"The exported program differs by {difference:.1e} at {shape}; nothing was written.")
    with atomic_path(args.output) as aside:
        torch.export.save(exported, aside)
    print(f"Written: {args.output}")
    return 0
