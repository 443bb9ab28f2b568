"""The wheel for one platform, with the CPU kernel compiled into it.

    DENSESEG_WHEEL_KERNEL=1 python -m hatchling build -t wheel
    auditwheel repair --exclude 'libtorch*.so' dist/*.whl  # checks it and gives it a manylinux tag

hatchling runs this module. It needs a C++ compiler and an environment with the package. Without the variable the wheel
is for any platform, and `denseseg kernels build` compiles after installation.
"""

import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNEL = "kernels/ms-deform-attn"


class CustomBuildHook(BuildHookInterface):
    """Adds the built variants beside the sources of the kernel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and name the platform in the wheel's tag; editable installs build their own."""
        if not os.environ.get("DENSESEG_WHEEL_KERNEL") or version == "editable":
            return
        root = Path(self.root)
        sys.path.insert(0, str(root / "src"))
        from hf_denseseg.ops import kernel_build

        for variant in kernel_build.build(root / KERNEL, root / KERNEL / "build"):
            target = f"hf_denseseg/ops/ms-deform-attn/build/{variant.name}"
            build_data["force_include"][str(variant)] = target
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data |= {"pure_python": False, "tag": f"py3-none-{platform}"}
