"""Who may import whom: the layer table of docs/architecture.md, read off the sources. Imports inside functions count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PTLAB = Path(__file__).parents[2] / "ptlab"

# The longest matching entry decides. A layer may import itself and the layers it names; "typing:" ones under `if TYPE_CHECKING:` only.
LAYER_OF = {
    "values": ("errors", "types", "futures", "section"),
    "pure": (
        "losses", "loss_formulas", "loss_graph", "loss_graph_run", "loss_ops", "loss_table",
        "model_info", "renderers", "rewards", "sandbox",
        "rl.advantages", "rl.diagnostics", "rl.preference_losses", "rl.seeds", "rl.statistics", "rl.types", "rl.win_rate",
    ),
    "protocols": ("engines.protocols",),
    "engines": ("engines",),
    "backend": ("backend",),
    "client": ("client",),
    "server": ("server",),
    "config": ("config",),
    "algorithms": ("rl", "envs"),
    "recipes": ("recipes", "runlog", "report", "curves", "figures", "smoke", "trackers", "provenance"),
    "tiny_models": ("tiny_models",),  # make a model (engines) that knows a task (envs); only roots use them
    "benchmarks": ("benchmarks",),
    "roots": ("local", "cli", "doctor", "evaluate", "learning_rates", "serve", "keys", "top", ""),
}  # fmt: skip
MAY_IMPORT = {
    "values": (),
    "pure": ("values",),
    "protocols": ("values", "pure"),
    "engines": ("values", "pure", "protocols"),
    "backend": ("values", "pure", "protocols"),
    "client": ("values", "backend"),
    "server": ("values", "pure", "protocols", "backend"),
    "config": ("values", "pure", "algorithms"),
    "algorithms": ("values", "pure", "typing:client"),
    "recipes": ("values", "pure", "algorithms", "config", "typing:client"),
    "tiny_models": ("values", "pure", "protocols", "engines", "algorithms"),
    "benchmarks": ("values", "pure", "protocols", "engines", "backend", "tiny_models"),  # only scripts use it
    "roots": tuple(LAYER_OF),
}
HEAVY = {
    "transformers": ("engines",),
    "peft": ("engines",),
    "vllm": ("engines",),
    "datasets": ("algorithms",),
    "fastapi": ("server",),
    "google": ("server",),  # protobuf
    "zstandard": ("server",),
    "uvicorn": ("server",),
    "tinker": ("client",),
}


def layer_of(module: str) -> str:
    """Layer of a module name without the leading "ptlab."; the longest matching entry decides."""
    matches = [
        (entry, layer) for layer, entries in LAYER_OF.items() for entry in entries if module == entry or module.startswith(f"{entry}.")
    ]
    assert matches, f"ptlab.{module} stands in no layer; give it one here and in docs/architecture.md"
    return max(matches, key=lambda match: len(match[0]))[1]


def modules() -> dict[str, Path]:
    names = {path: path.relative_to(PTLAB).with_suffix("").as_posix().replace("/", ".") for path in PTLAB.rglob("*.py")}
    return {name.removesuffix("__init__").rstrip("."): path for path, name in names.items()}


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, bool]]:
    """(imported name, for typing only) of every import statement; names of ptlab without "ptlab." but with a leading dot."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it out"
            full = [f"{node.module}.{alias.name}" for alias in node.names]  # `from ptlab.rl import datums` names a module
            targets = [name if name.removeprefix("ptlab.") in known else str(node.module) for name in full]
        else:
            continue
        for target in targets:
            yield target, id(node) in typing_only


def edges() -> list[tuple[str, str, bool]]:
    """(importer, imported, for typing only); ptlab's own modules without "ptlab."; other packages as "package:<name>"."""
    known = modules()
    found = []
    for module, path in known.items():
        for target, typing_only in imports(path, known):
            own = target == "ptlab" or target.startswith("ptlab.")
            name = target.removeprefix("ptlab").removeprefix(".") if own else f"package:{target.split('.')[0]}"
            found.append((module, name, typing_only))
    return found


def test_layers_import_downward_only() -> None:
    wrong = []
    for module, target, typing_only in edges():
        if target.startswith("package:"):
            continue
        importer, imported = layer_of(module), layer_of(target)
        allowed = MAY_IMPORT[importer]
        if imported not in (importer, *allowed) and not (typing_only and f"typing:{imported}" in allowed):
            wrong.append(f"ptlab.{module} ({importer}) imports ptlab.{target} ({imported})")
    assert wrong == []


def test_heavy_libraries_stay_in_their_layer() -> None:
    wrong = [
        f"ptlab.{module} imports {target.removeprefix('package:')}"
        for module, target, _ in edges()
        if (owners := HEAVY.get(target.removeprefix("package:"))) and layer_of(module) not in owners
    ]
    assert wrong == []


def test_nothing_imports_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, target, typing_only in edges():
        if not target.startswith("package:") and not typing_only:
            graph.setdefault(module, set()).add(target)
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as err:
        pytest.fail(" -> ".join(f"ptlab.{name}" for name in err.args[1]))


def test_the_reader_sees_lazy_and_typing_imports(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ptlab.client import service\n"
        "def f():\n    from ptlab.rl import datums, nothing\n",
        encoding="utf-8",
    )
    known = {"rl.datums": path, "rl": path, "client.service": path}
    assert sorted(imports(path, known)) == [
        ("ptlab.client.service", True),
        ("ptlab.rl", False),
        ("ptlab.rl.datums", False),
        ("typing", False),
    ]
