# SPDX-License-Identifier: Apache-2.0
"""Build hook: compile `ops/kernels.c` where there is a C compiler; the package works without, only slower."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("src", "keelwright", "ops")
FLAGS = ("-O3", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")


class KernelHook(BuildHookInterface):
    """Adds the compiled library to wheels and to editable installs."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and mark the wheel as made for this platform when that worked."""
        if self.target_name != "wheel":
            return
        library = Path(self.root, FOLDER, "_kernels.so")
        if not compile_library(Path(self.root, FOLDER, "kernels.c"), library):
            return
        build_data["artifacts"].append(f"/{(FOLDER / library.name).as_posix()}")
        build_data["pure_python"] = False
        build_data["infer_tag"] = True


def compile_library(source: Path, library: Path) -> bool:
    """Compile the source into the library; tell whether it is there and say why not."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform == "win32":
        sys.stderr.write("keelwright: no C compiler, building without compiled kernels\n")
        return False
    partial = library.with_suffix(".partial")
    command = [*compiler.split(), *FLAGS, str(source), "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(f"keelwright: building without compiled kernels: {done.stderr.strip()[:500]}\n")
        return False
    partial.replace(library)
    return True
