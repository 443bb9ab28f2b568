"""The trained checkpoint in the package."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "example"


def example_checkpoint() -> str:
    """Folder of a small trained model of street scenes (3 M parameters), to try the package without a network.

    A narrow HFGD on EfficientNet-Lite0 with ImageNet weights, trained on the drawn streets of this package only. Its
    card, `README.md`, tells how it scores on real ones. Beside it lies a photograph, `photo.jpg`.

    Returns:
        A path for `from_pretrained`, `pipeline` and the commands.
    """
    return str(FOLDER)
