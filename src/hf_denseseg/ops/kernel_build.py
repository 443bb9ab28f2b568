"""Build this project's kernel repository with a plain C++ compiler, in the folder layout of the kernels library."""

import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from hf_denseseg.errors import InputError, RunError
from hf_denseseg.ops.kernel_paths import BUILD, SOURCE

_COMPILERS = ("g++", "clang++", "c++")
_TARGETS = {"2.11": "0x020b000000000000"}  # stable ABI of torch -> TORCH_TARGET_VERSION for its headers

# What kernel-builder generates for a stable-ABI extension, adapted to a library that is loaded by path.
_REGISTRATION = """#pragma once
#define STABLE_TORCH_LIBRARY_EXPAND(NAME, MODULE) STABLE_TORCH_LIBRARY(NAME, MODULE)
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(NAME, DEVICE, MODULE) STABLE_TORCH_LIBRARY_IMPL(NAME, DEVICE, MODULE)
#define REGISTER_EXTENSION(NAME)
"""
_OPS = '''"""Where the operators of this build are registered."""

from pathlib import Path

import torch

_LIBRARY = {library!r}
ops = torch.ops.{namespace}
# A copy of this build in another folder may be loaded already; registering the operators twice would end the process.
if _LIBRARY is not None and not hasattr(ops, "forward"):
    torch.ops.load_library(Path(__file__).with_name(_LIBRARY))


def add_op_namespace_prefix(name: str) -> str:
    """Full name of an operator of this build."""
    return f"{namespace}::{{name}}"
'''


def compiler() -> str | None:
    """Path of the first C++ compiler on the PATH, or None."""
    return next((path for name in _COMPILERS if (path := shutil.which(name))), None)


def build(source: Path = SOURCE, output: Path = BUILD) -> list[Path]:
    """Build the CPU library and the Triton form for CUDA, unless `output` holds them already.

    Args:
        source: folder with `build.toml`.
        output: folder for the two variant folders; `LOCAL_KERNELS=<repo-id>=<output>` finds them.

    Returns:
        The variant folders.

    Raises:
        InputError: if `source` is no kernel repository or there is no compiler.
        RunError: if the compiler fails, with its messages.
    """
    if not (source / "build.toml").is_file():
        raise InputError(
            f"there is no build.toml in {source}. The sources are in `kernels/ms-deform-attn` of the repository: "
            "clone it and give that folder with --source."
        )
    description = tomllib.loads((source / "build.toml").read_text())
    program = compiler()
    if program is None:
        raise InputError(
            f"no C++ compiler ({', '.join(_COMPILERS)}) was found; install one, such as `apt install g++`."
        )
    name, stable = description["general"]["name"].replace("-", "_"), description["torch"]["stable-abi"]["cpu"]
    system = "darwin" if sys.platform == "darwin" else "linux"
    compiled = f"torch-stable-abi{stable.replace('.', '')}-cpu-{platform.machine()}-{system}"
    variants = [output / compiled, output / "torch-cuda"]
    mark = _digest(source)
    for variant, backend in zip(variants, ("cpu", "cuda"), strict=True):
        identity = f"_{name}_{backend}_{mark}"
        if _identity(variant) == identity:
            continue
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output, prefix=".building-") as folder:
            new = Path(folder) / "variant"
            shutil.copytree(source / "torch-ext" / name, new, ignore=shutil.ignore_patterns("__pycache__"))
            library = None
            if backend == "cpu":
                library = f"_{name}.abi3.so"
                _compile(program, description, source, identity, _TARGETS[stable], new / library)
            (new / "_ops.py").write_text(_OPS.format(library=library, namespace=identity))
            metadata = {
                "id": identity,
                "name": description["general"]["name"],
                "version": description["general"]["version"],
                "license": description["general"]["license"],
                "python-depends": [],
                "backend": {"type": backend},
            }
            (new / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
            shutil.rmtree(variant, ignore_errors=True)
            new.replace(variant)
    return variants


def _digest(source: Path) -> str:
    """Short digest of everything a build depends on: sources, flags and this module."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(source.rglob("*")):
        if (
            path.is_file()
            and path.suffix in {".cpp", ".h", ".py", ".toml"}
            and not {"build", "tests", "benchmarks", "example.py"} & set(path.relative_to(source).parts)
        ):
            digest.update(path.relative_to(source).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _identity(variant: Path) -> str | None:
    """Id of the build in a variant folder (its sources' digest included), or None where there is none."""
    try:
        return json.loads((variant / "metadata.json").read_text())["id"]
    except (OSError, ValueError, KeyError):
        return None


def _compile(program: str, description: dict, source: Path, namespace: str, target: str, library: Path) -> None:
    """Compile every section of `build.toml` for the CPU, in parallel, and link them."""
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "registration.h").write_text(_REGISTRATION)
        common = [
            "-std=c++20",
            "-O2",
            "-fPIC",
            "-fvisibility=hidden",
            f"-DTORCH_TARGET_VERSION={target}",
            "-DCPU_KERNEL",
        ]
        common += [f"-DTORCH_EXTENSION_NAME={namespace}", f"-I{folder}", f"-I{torch_folder / 'include'}"]
        jobs, objects = [], []
        sections = [description["torch"], *(s for s in description["kernel"].values() if s["backend"] == "cpu")]
        for section in sections:
            flags = section.get("cxx-flags", [])
            if platform.machine() not in ("x86_64", "AMD64"):
                flags = [flag for flag in flags if not flag.startswith("-m")]
            for unit in (path for path in section["src"] if path.endswith(".cpp")):
                objects.append(f"{folder}/{Path(unit).stem}.o")
                jobs.append([program, *common, *flags, "-c", str(source / unit), "-o", objects[-1]])
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, jobs))
        _run([program, "-shared", *objects, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-o", str(library)])


def _run(command: list[str]) -> None:
    """Run the compiler; its output is shown only if it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RunError(f"the compiler failed ({result.returncode}): {' '.join(command)}\n{result.stderr[-3000:]}")
