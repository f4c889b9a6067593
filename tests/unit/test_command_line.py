"""What all commands share: help in groups, options from a TOML file, defaults by device, and how far they are."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import compare_modes
import megatron_step
import pytest
import roll_latency
import scaling_model
import soak
import sweep
import torch
from rich.console import Console

from compare.report import markdown_of
from dropin.report import title_of
from harness import progress
from harness.command import exit_with_1_if, parse_options, write_record
from harness.progress import Progress, duration, with_progress
from training.settings import RunSettings

from command_options import OPTIONS

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def parse(monkeypatch, capsys):
    """Return a function that parses a command line: the options, or what is said and the exit status."""

    def call(kind, *arguments, **options):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        try:
            return parse_options(kind, "About.", **options)
        except SystemExit as end:
            said = capsys.readouterr()
            return end.code, said.out + said.err

    return call


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def entries(said: str) -> dict[str, str]:
    """What `--help` says of each option, by its name: in one line, from its metavar on."""
    found = re.findall(
        r"^  --([a-z][a-z-]*)(?:, --no-[a-z-]+)?(.*?)(?=^  -|^ \w|\Z)", said, re.MULTILINE | re.DOTALL
    )
    return {name: " ".join(text.split()) for name, text in found}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_says_of_each_option_what_it_is_and_its_default(parse, command):
    status, said = parse(OPTIONS[command], "--help")
    assert status == 0
    assert len(entries(said)) >= (0 if command == "golden" else 4)
    for name, text in entries(said).items():
        assert re.search(r"[\w.`-]\S* \w.*[.)] \((default: .+|required|repeatable)\)$", text), (name, text)
        assert "None" not in text


def test_the_same_thing_has_the_same_name_in_all_commands(parse):
    """A name in the plural takes a list. So do `documents`, `depths` and `ranks` if a command sweeps over them."""
    metavars = {}
    for kind in OPTIONS.values():
        for name, text in entries(parse(kind, "--help")[1]).items():
            metavars.setdefault(name, set()).add(text.split()[0] if re.match(r"[A-Z]+|{", text) else "flag")
    swept = {name: {"INT", "INT,..."} for name in ("documents", "depths", "ranks")}
    assert {name: found for name, found in metavars.items() if "INT,..." in found} == swept
    lists = {name for name, found in metavars.items() if "WORD,..." in found}
    assert lists == {"modes", "transports", "presets", "directions", "dtypes"}
    assert not {"num-documents", "schedules", "size", "micro", "tokens"} & {*metavars}


def test_options_of_bases_are_groups(parse):
    _, said = parse(RunSettings, "--help")
    names = ("output", "data", "model", "activation", "optimizer", "rank")
    groups = ["options", *(f"{name} options" for name in names)]
    assert re.findall(r"^ ((?:\w+ )?options) ", said, re.MULTILINE) == groups
    settings = parse(RunSettings, "--cp", "4", "--documents", "0", "--curves", "a", "--curves", "b")
    assert settings == RunSettings(cp=4, documents=0, curves=(Path("a"), Path("b")))


@pytest.mark.parametrize("option", ["--out", "--data", "--profile-out", "--config"])
def test_no_path_is_empty(parse, option):
    status, said = parse(compare_modes.Options, option, "")
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith("error: ")
    assert option in said


FILE = """
preset = "small"
documents = 0
depths = 3
modes = ["sync", "prefetch:process_group"]
compile = true
out = "somewhere"
ranks = 4
"""


def test_a_file_gives_options_and_the_command_line_wins(parse, tmp_path):
    (tmp_path / "run.toml").write_text(FILE)
    found = parse(
        compare_modes.Options, "--config", tmp_path / "run.toml", "--documents", "5", "--no-compile"
    )
    expected = compare_modes.Options("small", documents=5, out=Path("somewhere"))
    settings = replace(expected.settings, modes=("sync", "prefetch:process_group"))
    model, where = replace(expected.model, num_depths=3), replace(expected.where, ranks=4)
    assert found == replace(expected, settings=settings, model=model, where=where)
    shown = entries(parse(compare_modes.Options, f"--config={tmp_path / 'run.toml'}", "--help")[1])
    assert shown["preset"].endswith("(default: small)")
    assert shown["depths"].endswith("(default: 3)")


def test_a_file_may_give_what_a_command_needs(parse, tmp_path):
    file = tmp_path / "links.toml"
    file.write_text('fast = ["a", "b"]\n')
    assert parse(scaling_model.Options, "--config", file).fast == (Path("a"), Path("b"))
    assert parse(scaling_model.Options, "--config", file, "--fast", "c").fast == (Path("c"),)
    file.write_text("")
    status, said = parse(scaling_model.Options, "--config", file)
    assert (status, "--fast" in said) == (2, True)
    file.write_text("documents = [0, 32]\ndepths = 2\nlimit = 5\n")
    options = parse(megatron_step.Options, "--config", file)
    assert (options.documents, options.depths, options.limit) == ((0, 32), 2, 5.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("round = 3", ["'round' must be one of the options", "rounds", "seq-len", "token-dtype"]),
        ("seq_len = 3", ["'seq_len' must be one of the options", "seq-len"]),
        ("[timing]\nrounds = 3", ["'timing' must be one of the options"]),
        ('rounds = "many"', ["rounds must be an integer, got 'many'"]),
        ("rounds = 3.0", ["rounds must be an integer, got 3.0"]),
        ("rounds = true", ["rounds must be an integer, got True"]),
        ("rounds = [3]", ["rounds must be an integer, got [3]"]),
        ("ranks = 1.5", ["ranks must be an integer, got 1.5"]),
        ("compile = 1", ["compile must be true or false, got 1"]),
        ('layout = "round"', ["layout must be one of 'zigzag', ", "got 'round'"]),
        ("out = 3", ["out must be a path as a string, got 3"]),
        ('out = ""', ["out must be a path as a string, got ''"]),
        ("modes = []", ["modes must be a list, got []"]),
        ("modes = [1.5]", ["modes must be a list, got [1.5]"]),
        ('modes = "sync,,"', ["modes must be words with a comma between them"]),
        ("rounds 3", ["must be a TOML file", "line 1"]),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_key(parse, tmp_path, text, words):
    (tmp_path / "run.toml").write_text(text)
    status, said = parse(compare_modes.Options, "--config", tmp_path / "run.toml")
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith(f"error: {tmp_path / 'run.toml'}")
    assert all(one in said for one in words), said


def test_a_file_that_cannot_be_read_is_said(parse, tmp_path):
    for path in (tmp_path / "nowhere.toml", tmp_path):
        status, said = parse(sweep.Options, "--config", path)
        assert (status, said.count("\n")) == (2, 1)
        assert said.startswith("error: ")
        assert str(path) in said


def test_the_example_for_training_is_a_legal_run(parse, monkeypatch, tmp_path, on_cpu):
    monkeypatch.chdir(tmp_path)
    settings = parse(RunSettings, "--config", EXPERIMENTS / "train.toml").resolved()
    assert (settings.out, settings.experts, settings.recompute) == (Path("out/experts"), 4, True)
    assert settings.stream(settings.corpus()).num_documents == 2


def test_defaults_follow_the_device(parse, tmp_path, on_cpu, monkeypatch):
    small = sweep.Options(presets=("tiny",))
    assert parse(sweep.Options, on_cpu=small) == small
    assert parse(sweep.Options, "--device", "cuda", on_cpu=small).presets == sweep.Options().presets
    (tmp_path / "run.toml").write_text('device = "cuda"')
    assert (
        parse(sweep.Options, "--config", tmp_path / "run.toml", on_cpu=small).presets
        == sweep.Options().presets
    )
    found = parse(sweep.Options, "--config", tmp_path / "run.toml", "--device", "cpu", on_cpu=small)
    assert found.presets == ("tiny",)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parse(sweep.Options, on_cpu=small) == sweep.Options()


@pytest.mark.parametrize("program", [sweep, roll_latency, soak, compare_modes])
@pytest.mark.usefixtures("on_cpu")
def test_on_cpu_a_small_size_is_the_default_and_the_full_one_is_named(parse, program, capsys, monkeypatch):
    on_cpu = program.ON_CPU
    small = parse(program.Options, on_cpu=on_cpu.options)
    assert small == on_cpu.options != program.Options()
    full = parse(program.Options, *on_cpu.full_size.split(), on_cpu=on_cpu.options)
    assert full == program.Options()
    for options in (small, replace(small, out=Path("elsewhere"))):
        on_cpu.say(options)
        assert on_cpu.full_size in capsys.readouterr().out
    on_cpu.say(full)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_cpu.say(small)
    assert capsys.readouterr().out == ""


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.02)
    file = io.StringIO()
    console = Console(file=file, force_terminal=False, width=40)
    for _ in with_progress(range(4), "cases of a long name", console, 6, 12):
        time.sleep(0.05)
    lines = file.getvalue().splitlines()
    assert lines[0] == "6 of 12 cases of a long name, 0 s so far"
    assert re.fullmatch(r"9 of 12 cases of a long name, \d+ s left", lines[-1])
    said = len(lines)
    time.sleep(0.05)
    assert len(file.getvalue().splitlines()) == said  # nothing after the end


def test_on_a_terminal_progress_is_a_bar():
    file = io.StringIO()
    with Progress(8, "rounds", Console(file=file, force_terminal=True, width=100)) as bar:
        bar.advance(3)
    assert re.search(r"rounds.*━.* 3/8 ", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue()))


def test_other_ranks_show_no_progress(monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.001)
    for terminal in (False, True):
        file = io.StringIO()
        for _ in with_progress(range(2), "rounds", Console(file=file, quiet=True, force_terminal=terminal)):
            time.sleep(0.01)
        assert file.getvalue() == ""


def test_durations_are_words():
    assert [duration(s) for s in (0.2, 40, 99, 100, 720, 5000, 9000)] == [
        "0 s",
        "40 s",
        "99 s",
        "2 min",
        "12 min",
        "83 min",
        "2.5 h",
    ]


def test_records_of_earlier_names_are_read():
    step = json.loads((EXPERIMENTS / "results/megatron/2xH200/h4096-4-microbatches/results.json").read_text())
    assert "h4096, 2 MTP layers, 4 microbatches, prefetch over auto" in title_of(step)
    dense = EXPERIMENTS / "results/step_time/2xH200/default/h4096-dense-train.json"
    assert "| dense | sync |" in markdown_of({"dense": json.loads(dense.read_text())})


def test_a_wrong_record_ends_rank_0_with_1(tmp_path, monkeypatch):
    good, bad = (write_record({"wrong": wrong}, tmp_path / f"{wrong}.json") for wrong in (0, 3))
    monkeypatch.setenv("RANK", "0")
    exit_with_1_if(lambda record: record["wrong"], good, good)
    with pytest.raises(SystemExit, match=r"^1$"):
        exit_with_1_if(lambda record: record["wrong"], good, bad)
    monkeypatch.delenv("RANK")
    with pytest.raises(SystemExit, match=r"^1$"):
        exit_with_1_if(lambda record: record["wrong"], bad)
    monkeypatch.setenv("RANK", "1")
    exit_with_1_if(lambda record: record["wrong"], bad, tmp_path / "on another machine.json")
