"""Kernels as a GPU gets them: tests run in a process where Triton interprets them."""

from __future__ import annotations

import os
import subprocess
import sys


def run_compiling(file: str, *arguments: str) -> list[str]:
    """What a file prints, word by word, in a process of its own where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, file, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
