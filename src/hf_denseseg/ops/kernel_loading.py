"""Find, load and choose kernels for deformable attention; nothing is ever compiled here.

The `kernels` library does the loading. Sources, in order: a folder named in `LOCAL_KERNELS`, the build folder of a
checkout (`denseseg kernels build`), the kernels hub. A kernel is checked against the definition when it is loaded.
Without a kernel, plain torch (`ops.reference`) is used, and one warning says why.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from hf_denseseg.errors import InputError
from hf_denseseg.ops.kernel_paths import BUILD
from hf_denseseg.ops.reference import ms_deform_attn_reference

KERNEL = "hf-denseseg/ms-deform-attn"
VERSION = 1
INTERFACE = 1  # version of the kernel's functions (arguments and results) that this module expects
HUB_KERNEL = "kernels-community/deformable-detr"  # CUDA, float32, eager
HUB_VERSION = 1
PATHS = ("auto", "compiled", "triton", "hub", "reference")  # values of DENSESEG_MSDA

logger = logging.getLogger(__name__)


@dataclass
class Search:
    """Result of a search for a kernel.

    Args:
        kernel: the loaded module, or None.
        source: where it was found.
        failures: source -> why it has none.
    """

    kernel: ModuleType | None = None
    source: str | None = None
    failures: dict[str, str] = field(default_factory=dict)

    def reasons(self) -> str:
        """All failures in one line."""
        return "; ".join(f"{source}: {reason}" for source, reason in self.failures.items())


def choose_path(value: Tensor, offsets: Tensor) -> str:
    """Choose the code that will run: "compiled" (CPU), "triton" (CUDA), "hub" (CUDA, eager) or "reference".

    `DENSESEG_MSDA` forces one of them.

    Raises:
        InputError: if the forced one does not exist, or does not support these tensors.
    """
    forced, device = _forced_path(), value.device.type
    if forced == "reference" or (forced == "auto" and not _computable(value, offsets)):
        return "reference"
    if device == "meta":  # only shapes and FLOPs are needed
        return "compiled"
    own = "compiled" if device == "cpu" else "triton"
    reason = _own_kernel_fault(device)
    if reason is None and not torch.compiler.is_compiling():
        kernel = find_kernel(device).kernel
        assert kernel is not None
        reason = kernel.unserved(value, offsets)
    eager_cuda = device == "cuda" and not torch.compiler.is_compiling()
    if forced == "auto":
        if reason is None:
            return own  # on CUDA too: forward 2.2x to 4.1x, backward 0.9x to 2.2x the speed of the hub's (H200)
        return "hub" if eager_cuda and find_hub_kernel().kernel is not None else "reference"
    if forced == "hub":
        reason = find_hub_kernel().reasons() if eager_cuda else "the hub kernel is for eager CUDA only"
    elif forced != own:
        reason = f"it is for {'the CPU' if forced == 'compiled' else 'CUDA'}, the tensors are on {device}"
    if reason:
        raise InputError(f"DENSESEG_MSDA={forced} cannot be followed: {reason}. Set it to auto or reference.")
    return forced


def _computable(value: Tensor, offsets: Tensor) -> bool:
    """Whether kernels exist for these dtypes and counts; float64, as `gradcheck` uses, runs in plain torch."""
    exact = torch.float64 in (value.dtype, offsets.dtype)
    return not exact and offsets.shape[3] <= 16 and offsets.shape[3] * offsets.shape[4] <= 256


@torch.compiler.assume_constant_result
def _forced_path() -> str:
    """Value of `DENSESEG_MSDA`, or "reference" during ONNX export, whose graph knows no custom operator."""
    forced = os.environ.get("DENSESEG_MSDA", "auto")
    if forced not in PATHS:
        raise InputError(f"DENSESEG_MSDA={forced} is unknown; choose one of {', '.join(PATHS)}.")
    return "reference" if torch.onnx.is_in_onnx_export() else forced


@torch.compiler.assume_constant_result
def _own_kernel_fault(device_type: str) -> str | None:
    """Why there is no kernel of ours for a type of device, or None if there is one."""
    search = find_kernel(device_type)
    if search.kernel is not None:
        return None
    return search.reasons()


@lru_cache
def find_kernel(device_type: str) -> Search:
    """Our own kernel for a type of device ("cpu" or "cuda"); searched once per process."""
    search = Search()
    if device_type not in ("cpu", "cuda"):
        search.failures["kernel"] = f"there is none for {device_type}"
        return search
    if device_type == "cuda" and not torch.cuda.is_available():
        search.failures["kernel"] = "no CUDA device is present"
        return search
    load_here = partial(_from_hub, device_type=device_type)  # obeys LOCAL_KERNELS
    named = [entry.partition("=")[2] for entry in os.environ.get("LOCAL_KERNELS", "").split(":") if KERNEL in entry]
    if named:
        _try(search, f"LOCAL_KERNELS {_contents(Path(named[0]))}", load_here)
    elif BUILD.is_dir():
        source = f"build folder {_contents(BUILD)}"
        _try(search, source, lambda library: library.get_local_kernel(BUILD, backend=device_type))
    if search.kernel is None and not named:
        _try(search, f"hub {KERNEL}", load_here)
    if search.kernel is not None and (reason := _fault(search.kernel, device_type)):
        search.failures[str(search.source)], search.kernel, search.source = reason, None, None
    if search.kernel is None:
        logger.warning(
            f"deformable attention on {device_type} runs in plain torch, many times slower: {search.reasons()}"
        )
    return search


@lru_cache
def find_hub_kernel() -> Search:
    """The CUDA kernel of the Deformable DETR authors from the kernels hub; searched once per process."""
    search = Search()
    _try(search, f"hub {HUB_KERNEL}", lambda library: library.get_kernel(HUB_KERNEL, version=HUB_VERSION))
    return search


def _contents(folder: Path) -> str:
    """Describe a kernel folder by its builds, whose names tell versions and processor."""
    builds = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return f"{folder} (holds {', '.join(builds) or 'nothing'})"


def _from_hub(library: ModuleType, device_type: str) -> ModuleType:
    """Load our kernel by its id, which `LOCAL_KERNELS` may map to a folder; no other publisher is trusted for it."""
    return library.get_kernel(KERNEL, version=VERSION, backend=device_type, trust_remote_code=[KERNEL])


def _try(search: Search, source: str, load: Callable[[ModuleType], ModuleType]) -> None:
    """Load from one source; any failure becomes a reason, since plain torch always works."""
    try:
        import kernels
    except ImportError:
        search.failures[source] = "the kernels library is missing (pip install 'hf-denseseg[kernels]')"
        return
    try:
        search.kernel, search.source = load(kernels), source
    except Exception as error:  # a foreign library, foreign files, the network: the kinds of failure are open-ended
        search.failures[source] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _fault(kernel: ModuleType, device_type: str) -> str | None:
    """Why a loaded kernel must not be used: another interface, or results that differ from the definition."""
    if getattr(kernel, "INTERFACE", None) != INTERFACE:
        return (
            f"it has interface {getattr(kernel, 'INTERFACE', None)}, {INTERFACE} is needed; build or download it again"
        )
    shapes = [(3, 5), (2, 2)]
    random = torch.Generator().manual_seed(0)
    sizes = [(1, 19, 2, 32), (1, 4, 2, 2, 3, 2), (1, 4, 2, 2, 3), (1, 4, 2, 2)]
    value, offsets, logits, references = (torch.randn(size, generator=random).to(device_type) for size in sizes)
    try:
        if (reason := kernel.unserved(value, offsets)) is not None:
            return reason
        found, _ = kernel.forward(value, offsets, logits, references.sigmoid(), [3, 5, 2, 2])
    except Exception as error:
        return f"its first call failed with {type(error).__name__}: {error}"
    expected = ms_deform_attn_reference(value, offsets, logits, references.sigmoid(), shapes)
    if not torch.allclose(found, expected, atol=1e-5):
        return "its results differ from the definition; build or download it again"
    return None
