"""Imports go one way, from programs down to the layout, and never in a circle. Imports for typing count."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "overlap_mtp": "overlap_mtp.",
    "kernels": "overlap_mtp.kernels.",
    "profiles": "profiles.",
    "experiments": "",
}
MODULES = {
    prefix + ".".join(path.relative_to(ROOT / folder).with_suffix("").parts): path
    for folder, prefix in FOLDERS.items()
    for path in (ROOT / folder).rglob("*.py")
}
LEVELS = [
    "layout device_layout documents labels tensors tracing",
    "reference",
    "exchange kernels",
    "schedules",
    "model",
    "training",
]
LIBRARY = [{f"overlap_mtp.{name}" for name in level.split()} for level in LEVELS]
MAY_IMPORT = {part: set().union(*LIBRARY[: n + 1]) for n, level in enumerate(LIBRARY) for part in level}
MAY_IMPORT["overlap_mtp.__init__"] = set(MAY_IMPORT)
MAY_IMPORT["overlap_mtp.megatron"] = {*MAY_IMPORT["overlap_mtp.schedules"], "overlap_mtp.megatron"}
MAY_IMPORT["overlap_mtp.profiling"] = {"overlap_mtp.profiling", "overlap_mtp.labels"}
MAY_IMPORT["overlap_mtp.conformance"] = {
    *("overlap_mtp.conformance", "overlap_mtp.layout", "overlap_mtp.device_layout"),
    *("overlap_mtp.reference", "overlap_mtp.schedules"),
    "overlap_mtp.tensors",
}
MAY_IMPORT["profiles"] = {"overlap_mtp.profiling"}
MAY_IMPORT["harness"] = {*MAY_IMPORT, "harness"} - {"profiles"}
MAY_IMPORT |= {
    part: {*MAY_IMPORT["harness"], part} for part in ("compare", "dropin", "latency", "soaks", "training")
}
PROGRAMS = {name for name in MODULES if "." not in name}  # of experiments/: they may import everything
MAY_IMPORT |= {program: {*MAY_IMPORT, *PROGRAMS} for program in PROGRAMS}


def part_of(module: str) -> str:
    """The part that a module is in, as MAY_IMPORT calls it."""
    return next((part for part in MAY_IMPORT if f"{module}.".startswith(f"{part}.")), f"unlisted {module}")


def imports_of(path: Path) -> set[str]:
    """Our own modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import: name the whole module"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for one in found for name in (one, f"{one}.__init__") if name in MODULES}


def test_imports_go_one_way():
    graph = {name: imports_of(path) for name, path in MODULES.items()}
    pairs = [(name, other) for name, others in graph.items() for other in sorted(others)]
    assert [pair for pair in pairs if part_of(pair[1]) not in MAY_IMPORT.get(part_of(pair[0]), ())] == []
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle
