"""Read the authors' checkpoints without running code in them, rename their keys by a table, load every key."""

import json
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_denseseg.errors import InputError, RunError, unknown_name

TIMM = "timm:"
TORCH_ENDINGS = (".pth", ".pt", ".bin", ".tar")


@dataclass(frozen=True)
class KeyTable:
    """How official key names become ours.

    Args:
        renames: (regular expression, replacement) pairs, applied in order, each wherever it matches.
        splits: part of a key -> the parts that replace it; the tensor is split along its rows into N equal pieces.
        dropped: regular expression of official keys that our model does not use.
    """

    renames: Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
    splits: Mapping[str, tuple[str, ...]]
    dropped: str = r"(?!)"

    def targets(self, key: str) -> list[str]:
        """Return our name of an official key, several if its tensor is split, or an empty list if it is dropped."""
        if re.search(self.dropped, key):
            return []
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        for part, pieces in self.splits.items():
            if part in key:
                return [key.replace(part, piece) for piece in pieces]
        return [key]


def read_weights(weights: str | Path | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read a checkpoint as a flat state dict; code inside a pickle is never executed.

    Args:
        weights: `.safetensors`, `.pth`, `.pt`, `.bin` or `.tar` file, or a state dict; a dict that holds the weights
            under `model` or `state_dict` is unpacked.

    Raises:
        InputError: missing, damaged or unsafe file, or entries that are no tensors.
    """
    state: Any = weights if isinstance(weights, Mapping) else _read_file(Path(weights))
    for wrapper in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise InputError(f"The checkpoint holds a {type(state).__name__}; a dictionary of tensors is needed.")
    others = [str(key) for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise InputError(
            f"The checkpoint holds entries that are no tensors: {', '.join(others[:10])}. "
            "Give the state dict itself, or one under `model` or `state_dict`."
        )
    return {str(key): value for key, value in state.items()}


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise InputError(
            f"Weights {path} do not exist. Give a .safetensors file or one of {', '.join(TORCH_ENDINGS)}."
        )
    if path.suffix not in (".safetensors", *TORCH_ENDINGS):
        raise InputError(f"Weights {path}: unknown ending. Use .safetensors or one of {', '.join(TORCH_ENDINGS)}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"Weights {path} are damaged or hold more than tensors, and such a file can run code: not opened. "
            "Ask its author for safetensors."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"Weights {path} cannot be read ({error}). The file may be truncated; download it again."
        ) from error


def fetch_weights(weights: str | Path | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read a file or state dict, or load `timm:NAME` through timm, a folder or hub id through transformers.

    Raises:
        InputError: a name that timm does not know, a file that cannot be read.
        RunError: weights that cannot be fetched.
    """
    if isinstance(weights, str) and weights.startswith(TIMM):
        return _fetch_from_timm(weights.removeprefix(TIMM))
    endings = (".safetensors", *TORCH_ENDINGS)  # names of folders and hub ids may hold other dots
    if isinstance(weights, Mapping) or Path(weights).is_file() or Path(weights).suffix in endings:
        return read_weights(weights)
    from transformers import AutoModel

    try:
        return AutoModel.from_pretrained(weights).state_dict()
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if Path(weights).exists():
            raise InputError(
                f"{weights} is no folder of a transformers model ({reason}). Give such a "
                "folder, a file of weights, or "
                "timm:NAME."
            ) from error
        raise RunError(
            f"Encoder weights {str(weights)!r} could not be fetched: {reason} Give a file, a folder, or timm:NAME."
        ) from error


def _fetch_from_timm(name: str) -> dict[str, torch.Tensor]:
    import timm

    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise InputError(unknown_name("timm model", name, known, otherwise="`timm.list_models()` names them."))
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except RuntimeError as error:  # no weights under this name, or an unknown tag behind the dot
        raise InputError(f"timm has no weights {name!r}: {error}") from error
    except OSError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"timm could not fetch {name}: {reason} Check the network, or give a file of weights."
        ) from error


def read_hyper_parameters(hyper_parameters: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Read the official sizes from a dict or a JSON file.

    Raises:
        InputError: no such file, or no JSON object in it.
    """
    if isinstance(hyper_parameters, Mapping):
        return dict(hyper_parameters)
    path = Path(hyper_parameters)
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"Hyper-parameters {str(path)!r} are neither a published name (`denseseg models` "
            "lists them) nor a readable "
            f"JSON file ({error})."
        ) from error
    if not isinstance(read, dict):
        raise InputError(
            f"Hyper-parameters {path} hold a {type(read).__name__}; a JSON object with the names of "
            "the official code is needed."
        )
    return read


def need(hyper_parameters: Mapping[str, Any], *names: str) -> list[Any]:
    """Return the values of `names`.

    Raises:
        InputError: some are missing; lists them.
    """
    missing = [name for name in names if name not in hyper_parameters]
    if missing:
        raise InputError(
            f"The hyper-parameters lack {', '.join(missing)}. Add them under the names of the official code."
        )
    return [hyper_parameters[name] for name in names]


def load_converted(
    model: torch.nn.Module, official: Mapping[str, torch.Tensor], table: KeyTable, may_miss: str = r"(?!)"
) -> list[str]:
    """Rename `official` by `table` and load it into `model`; every key on both sides must be accounted for.

    Args:
        model: receives the weights.
        official: state dict with the authors' names.
        table: renames them to ours.
        may_miss: regular expression of our keys that the checkpoint need not contain (a new head).

    Returns:
        The official keys that the table drops.

    Raises:
        InputError: unused, missing or wrongly shaped keys; all are listed.
    """
    wanted = model.state_dict()
    found: dict[str, torch.Tensor] = {}
    dropped, unused, wrong = [], [], []
    for key, tensor in official.items():
        names = table.targets(key)
        if not names:
            dropped.append(key)
        elif any(name not in wanted or name in found for name in names):
            unused.append(key)
        elif tensor.shape[:1].numel() % len(names):
            wrong.append(f"{key} {list(tensor.shape)} (cannot be split into {len(names)} equal parts)")
        else:
            pieces = tensor.chunk(len(names)) if len(names) > 1 else (tensor,)
            for name, piece in zip(names, pieces, strict=True):
                found[name] = piece
                if piece.shape != wanted[name].shape:
                    wrong.append(f"{key} {list(piece.shape)} (our {name} has {list(wanted[name].shape)})")
    missing = [name for name in wanted if name not in found and not re.search(may_miss, name)]
    problems = {"unused keys": unused, "missing keys": missing, "wrong shapes": wrong}
    if any(problems.values()):
        lists = "; ".join(f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys)
        raise InputError(
            f"The weights do not fit {type(model).__name__} with these hyper-parameters. {lists}. "
            "Check that weights and hyper-parameters belong together."
        )
    model.load_state_dict(found, strict=False)
    return dropped
