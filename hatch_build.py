"""pip's build hook: compile native/ on the way in. Without a C++ compiler the package installs all the same, on torch alone.

A wheel carries the library beside src/trilobit/kernels/native.py and is for one platform, any Python; an editable install
leaves it in build/native/, where the checkout looks for it.
"""

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags


class NativeKernels(BuildHookInterface):
    """Compiles the kernels and, into a wheel, includes them."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        sys.path.insert(0, str(Path(self.root) / "src"))  # of this checkout, whatever is installed
        from trilobit.kernels import build

        try:
            library = build.build()
        except build.BuildError as error:
            self.app.display_warning(f"trilobit installs without its native kernels, and will compute with torch: {error}")
            return
        if version != "editable":
            build_data["force_include"][str(library)] = f"trilobit/kernels/{build.NAME}"
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{build.wheel_platform(library, next(platform_tags()))}"
