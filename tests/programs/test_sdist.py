"""The source distribution holds the whole repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_THERE = {".gitignore", "overlap_mtp/kernels"}  # the second is a link; its files are there


def test_every_file_of_the_repository_is_in_the_sdist(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a repository")
    run = {"check": True, "capture_output": True, "text": True, "timeout": 120}
    tracked = set(subprocess.run(["git", "ls-files"], cwd=ROOT, **run).stdout.splitlines())
    copy = tmp_path / "copy"  # a build leaves files in its folder
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (copy / name).symlink_to((ROOT / name).readlink())
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=copy, **run)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert tracked - held <= NOT_THERE
    assert "overlap_mtp/kernels/pack.py" in held
