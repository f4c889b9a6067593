"""pyproject.toml describes the package as it is, and the drawn diagrams are up to date."""

from __future__ import annotations

import runpy
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import overlap_mtp

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_installed():
    """`make` installs a link to the sources, so nobody would notice a missing entry there."""
    folders = {path.parent for path in (ROOT / "overlap_mtp").rglob("*.py")} | {ROOT / "overlap_mtp/kernels"}
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)


def test_the_version_is_the_same_everywhere():
    assert overlap_mtp.__version__ == PYPROJECT["project"]["version"]


def test_public_names_are_those_of_their_modules():
    """They are imported when they are first asked for, so nobody would notice a wrong entry before that."""
    star: dict[str, object] = {}
    exec("from overlap_mtp import *", star)
    assert set(star) - {"__builtins__"} == set(overlap_mtp.__all__) == set(overlap_mtp._MODULES)
    for name, module in overlap_mtp._MODULES.items():
        assert star[name] is getattr(import_module(f"overlap_mtp.{module}"), name)
    assert {*overlap_mtp.__all__, "__version__"} <= set(dir(overlap_mtp))
    page = (ROOT / "docs/integration.md").read_text().partition("## All public names")[2]
    assert [name for name in overlap_mtp.__all__ if f"`{name}" not in page] == []
    assert overlap_mtp.__getattr__("layout").SequenceLayout is overlap_mtp.SequenceLayout
    with pytest.raises(AttributeError, match="module 'overlap_mtp' has no attribute 'nonsense'"):
        overlap_mtp.nonsense  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nonsense' from 'overlap_mtp'"):
        exec("from overlap_mtp import nonsense")


def test_what_only_linux_has_is_asked_for_only_there():
    """triton and nvtx have no wheels for macOS, where people read profiles."""
    asked = {entry.partition(">=")[0]: entry for entry in PYPROJECT["project"]["dependencies"]}
    assert {name for name, entry in asked.items() if entry.endswith("; sys_platform == 'linux'")} == {
        "triton",
        "nvtx",
    }
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert set(extras["profiles"]) <= set(extras["experiments"])


def test_the_diagrams_are_what_their_script_draws():
    diagrams = runpy.run_path(str(ROOT / "docs/draw_diagrams.py"))["DIAGRAMS"]
    for name, draw in diagrams.items():
        assert (ROOT / "docs" / name).read_text() == draw(), name
