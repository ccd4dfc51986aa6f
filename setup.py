"""The one build step that pyproject.toml cannot express: ptlab/server/wire.proto becomes wire_pb2.py and wire_pb2.pyi beside it.

A sub-command of `build`, so that `pip install .`, `pip install -e .` and a wheel build run it and fail with it. (A build_py subclass
would do for wheels, but for an editable install setuptools turns its failure into a warning.)
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
PROTO = "ptlab/server/wire.proto"


class BuildWire(Command):
    """Compiles PROTO in place; build_py then takes the result for a module like any other."""

    description = f"compile {PROTO}"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []
    build_lib: str | None = None
    editable_mode: bool = False

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        from grpc_tools import protoc  # of the build environment only: [build-system] requires

        includes = [f"-I{ROOT}", f"-I{importlib.resources.files('grpc_tools') / '_proto'}"]
        if protoc.main(["protoc", *includes, f"--python_out={ROOT}", f"--pyi_out={ROOT}", str(ROOT / PROTO)]) != 0:
            raise RuntimeError(f"{PROTO}: the protobuf compiler failed; its message stands above")

    def get_source_files(self) -> list[str]:
        return [PROTO]

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands: ClassVar[list[tuple[str, Callable[[Any], bool] | None]]] = [("build_wire", None), *build.sub_commands]


setup(cmdclass={"build": Build, "build_wire": BuildWire})
