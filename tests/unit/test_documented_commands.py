"""The commands on the pages are legal: their options exist and have such values. Nothing is run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from harness.command import parse_options

from command_options import OPTIONS

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "experiments/README.md",
    "profiles/README.md",
    "profiles/capture.sh",
    "experiments/compare.slurm",
)
PAGES += tuple(f"experiments/{name}.py" for name in OPTIONS)


def commands_on(page: str) -> list[tuple[str, list[str]]]:
    """The programs of experiments/ that a page names with their arguments. capture.sh records compare_modes."""
    text, found = (ROOT / page).read_text().replace("\\\n", " "), []
    for line in re.findall(r"^#? {3,4}(\S.*)", text, re.MULTILINE):
        line = re.sub(r" +\([^()]*\)$", "", line)  # a remark
        captured = re.match(
            r"(?:PROGRAM=experiments/(\w+)\.py )?profiles/capture\.sh( --torch-profiler)? \S+ (-.*)", line
        )
        started = re.match(r"(?:\S*python|torchrun .*|sbatch .*) experiments/(\w+)\.(?:py|slurm)\b(.*)", line)
        made = re.match(r"make compare(?: +ARGS=\"(.*)\")?", line)
        if captured:
            name, arguments = captured[1] or "compare_modes", captured[3]
        elif made:
            name, arguments = "compare_modes", made[1] or ""
        elif started:
            name, arguments = started[1], started[2].partition(" && ")[0]
        else:
            continue
        found.append(("compare_modes" if name == "compare" else name, shlex.split(arguments, comments=True)))
    return [(name, arguments) for name, arguments in found if name in OPTIONS]


def commands_of_method() -> list[tuple[str, list[str]]]:
    """The commands of METHOD.md, with all variables of the shell filled in."""
    block = (
        (ROOT / "experiments/results/METHOD.md").read_text().partition("## Commands")[2].partition("\n## ")[0]
    )
    script = "\n".join(line for line in block.splitlines() if line.startswith("    "))
    stub = "python() { printf '%s\\n' \"$*\"; }\n"
    script = re.sub(r"\bCP\b", "2", script.replace("SCHEDULE", "sync"))
    done = subprocess.run(["bash", "-c", stub + script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    return [(Path(program).stem, arguments) for program, *arguments in lines]


def assert_legal(commands, monkeypatch, capsys):
    for name, arguments in commands:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        try:
            parse_options(OPTIONS[name], "")
        except SystemExit:
            pytest.fail(f"{name} {shlex.join(arguments)}: {capsys.readouterr().err}")


def test_commands_on_the_pages_are_legal(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    commands = [one for page in PAGES for one in commands_on(page)]
    assert {name for name, _ in commands} == {*OPTIONS}
    assert len(commands) > 35
    assert_legal(dict.fromkeys((name, tuple(arguments)) for name, arguments in commands), monkeypatch, capsys)


def test_commands_of_the_method_are_legal(monkeypatch, capsys):
    commands = commands_of_method()
    assert {name for name, _ in commands} == {*OPTIONS} - {"comparison_report", "golden"}
    assert len(commands) > 25
    assert_legal(commands, monkeypatch, capsys)
