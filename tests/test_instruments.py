"""The three instruments side by side, on runs made by hand with known answers."""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import instruments  # noqa: E402
import typer  # noqa: E402

from overlap_mtp.model.config import PRESETS  # noqa: E402
from overlap_mtp.profiling import exposed_by_step, read_profile, report_on  # noqa: E402

from handmade import Process, Span, Work, write_nsys  # noqa: E402

# What the exchange of a step exposes on ranks 0 and 1, in µs, in both rounds.
EXPOSED = {
    "sync": ((40, 60), (50, 50)),
    "prefetch:symmetric": ((4, 2), (3, 5)),
    "prepared": None,
    "none": None,
}
STEP_US, AROUND_US = {"sync": 160, "prefetch:symmetric": 110, "prepared": 100, "none": 90}, 20


def figure(value: float, by: float) -> dict[str, float]:
    return {"value": value, "low": value - by, "high": value + by}


def process(rank: int) -> Process:
    """Two rounds; each exchange lasts 20 µs longer than it is exposed."""
    spans, work = [], []
    for number in range(2):
        for position, (mode, exposed) in enumerate(EXPOSED.items()):
            at = 1000 + 1000 * (number * len(EXPOSED) + position)
            spans.append(Span(f"step {mode} r{rank}", at, at + STEP_US[mode] - rank))  # rank 0 is the slowest
            work.append(Work("gemm", at + 1, at + 10, at + 40))
            if exposed is not None:
                spans.append(Span(f"send-recv r{rank}", at + 2, at + 4))
                work.append(Work("put", at + 3, at + 20, at + 40 + exposed[number][rank], stream=9))
                spans.append(Span(f"unroll r{rank}", at + 5, at + 8))
                work.append(Work("unroll_kernel", at + 6, at + 101, at + 105))
    spans.append(Span(f"send-recv r{rank}", 20, 30))  # in no step, like the warm-up's
    work.append(Work("put", 25, 40, 900, stream=9))
    return Process(500 + rank, spans, work)


def record_of_run() -> dict[str, Any]:
    figures = {
        "sync": (figure(58, 3), figure(56, 1)),
        "prefetch:symmetric": (figure(10, 30), figure(9, 1)),
        "prepared": (figure(0, 0), figure(7, 1)),
        "none": (figure(-9, 1), figure(4, 1)),
    }
    return {
        "experiment": "compare_modes",
        "where": {"ranks": 2, "device": "GPU", "environment": {}},
        "transport": {mode: "symmetric" if "prefetch" in mode else "" for mode in EXPOSED},
        "settings": {
            "model": asdict(PRESETS["h4096"].model),
            "num_documents": 8,
            "forward_only": False,
            "rounds": 2,
            "layout": "zigzag",
            "compiled": False,
            "captured": False,
            "seed": 0,
        },
        "rows": {mode: {"exposed_us": a, "metered_us": b} for mode, (a, b) in figures.items()},
        "times_ms": {mode: 2 * [(STEP_US[mode] + AROUND_US) / 1000] for mode in EXPOSED},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plain = write_nsys(tmp_path / "plain.sqlite", [process(0), process(1)])
    (tmp_path / "profile.sqlite.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "results.json").write_text(json.dumps(record_of_run()))
    return tmp_path


def changed(folder: Path, **more: Any) -> Path:
    (folder / "results.json").write_text(json.dumps(record_of_run() | more))
    return folder


def run(*arguments: str | Path):
    app = typer.Typer()
    app.command()(instruments.main)
    return CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "400"})


def test_a_line_for_each_mode_that_exchanges(folder):
    lines, notes = instruments.read_run(folder)
    assert {line.configuration for line in lines} == {"h4096, 8 documents, train, 2 x GPU, 2 rounds"}
    assert [line.mode for line in lines] == ["sync", "prefetch (symmetric)"]
    sync, prefetch = (line.figures for line in lines)
    assert sync[:2] == (figure(58, 3), figure(56, 1))
    # The worst rank of each step: 60 and 50 µs, 4 and 5 µs; the unroll is not counted.
    assert sync[2] == pytest.approx({"value": 55, "low": 50, "high": 60})
    assert prefetch[2] == pytest.approx({"value": 4.5, "low": 4, "high": 5})
    assert [line.agree for line in lines] == ["no: 5.2 % apart", "no: by 3.0 µs"]
    assert notes == ()


def test_the_tables(folder):
    result = run(folder, folder, "--out", folder / "new" / "table.md")
    assert result.exit_code == 0, result.output
    assert "4.5 [4.0, 5.0]" in result.output
    text = (folder / "new" / "table.md").read_text()
    assert (
        text.count(
            "| sync | 58.0 [55.0, 61.0] | 56.0 [55.0, 57.0] | 55.0 [50.0, 60.0] | **no**: 5.2 % apart |"
        )
        == 2
    )
    assert "no unroll" in text


@pytest.mark.parametrize(
    ("schedule", "figures", "verdict"),
    [
        ("sync", [(100, 1), (97, 1), (96, 1)], "yes: 4.0 % apart"),
        ("sync", [(100, 20), (94, 20), (98, 20)], "no: 6.0 % apart"),
        ("sync", [(0, 1), (-3, 1), (0, 1)], "no: by 1.0 µs"),  # nothing to be a share of
        ("prefetch", [(-100, 200), (10, 1), (9, 1)], "yes"),
        ("prefetch", [(-100, 200), (10, 1), (7, 0.5)], "no: by 1.5 µs"),
        ("overlap", [(8, 3), None, (10, 1)], "yes (2 instruments)"),
        ("sync", [(100, 1), None, (90, 1)], "no: 10.0 % apart (2 instruments)"),
        ("overlap", [(8, 3), None, None], "-"),
    ],
)
def test_agreement(schedule, figures, verdict):
    assert instruments.agreement(schedule, [one and figure(*one) for one in figures]) == verdict


@pytest.mark.parametrize(
    ("more", "configuration"),
    [
        ({}, "h4096, 8 documents, train, 2 x GPU, 2 rounds"),
        ({"num_documents": None, "forward_only": True}, "h4096, dense, forward, 2 x GPU, 2 rounds"),
        (
            {"captured": True, "layout": "contiguous"},
            "h4096, 8 documents, train, 2 x GPU, 2 rounds, contiguous, captured",
        ),
        ({"model": {"hidden_size": 96}}, "hidden 96, 8 documents, train, 2 x GPU, 2 rounds"),
    ],
)
def test_the_name_of_a_configuration(more, configuration):
    record = record_of_run()
    record["settings"] |= more
    assert instruments.configuration_of(record) == configuration


def test_the_name_of_a_configuration_tells_of_slow_links():
    record = record_of_run()
    record["where"]["environment"] = {"NCCL_P2P_DISABLE": "1"}
    assert instruments.configuration_of(record).endswith("2 rounds, NCCL_P2P_DISABLE=1")


@pytest.mark.parametrize("missing", ["results.json", "profile.sqlite.gz"])
def test_a_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    result = run(folder)
    assert result.exit_code == 2
    assert f"there is no {missing}" in result.output


@pytest.mark.parametrize("text", ["[]", "{", json.dumps({"experiment": "soak"})])
def test_what_is_no_record_is_refused(folder, text):
    (folder / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json is not a record of compare_modes"):
        instruments.read_run(folder)


def test_a_damaged_profile_is_refused(folder):
    (folder / "profile.sqlite.gz").write_bytes(b"no profile")
    with pytest.raises(ValueError, match=r"profile\.sqlite\.gz: not a profile"):
        instruments.read_run(folder)


def test_record_and_profile_of_different_runs_are_refused(folder):
    times = record_of_run()["times_ms"]
    with pytest.raises(ValueError, match="3 ranks recorded, 2 devices profiled"):
        instruments.read_run(changed(folder, where={"ranks": 3}))
    with pytest.raises(ValueError, match=r"steps recorded: {'sync': 2, 'merged': 2"):
        instruments.read_run(changed(folder, times_ms={"sync": [1, 1], "merged": [1, 1]}))
    with pytest.raises(ValueError, match=r"'sync': 3, .* profiled on rank 0: {'sync': 2, "):
        instruments.read_run(changed(folder, times_ms=times | {"sync": [1, 1, 1]}))
    # Two of eight steps may be out of line (a first range takes longer to enter), four may not.
    assert instruments.read_run(changed(folder, times_ms=times | {"sync": [0.5, 0.1]}))
    for slower in (0.5, -0.1):
        others = {mode: [one[0] + slower, one[1]] for mode, one in times.items()}
        with pytest.raises(ValueError, match="only 4 of 8 steps take as long in the profile"):
            instruments.read_run(changed(folder, times_ms=others))


def test_an_exchange_that_the_profile_does_not_show_has_no_figure(folder):
    """Not 0: a replayed graph whose kernels were not traced, say."""
    plain = Process(
        500, [Span("step sync r0", 0, 100), Span("step prepared r0", 200, 300)], [Work("gemm", 5, 10, 50)]
    )
    rows = {"sync": {"exposed_us": figure(9, 1), "metered_us": None}, "prepared": {}}
    record = record_of_run() | {"where": {"ranks": 1, "device": "GPU"}, "rows": rows}
    report = report_on([read_profile(write_nsys(folder / "other.sqlite", [plain]))])
    (line,) = instruments.lines_of(record | {"times_ms": {"sync": [0.1], "prepared": [0.1]}}, report)
    assert line.cells()[2:] == ("9.0 [8.0, 10.0]", "-", "-", "-")


def test_exposed_times_of_the_recorded_profile_add_up_to_those_of_its_report():
    report = report_on([read_profile(ROOT / "profiles/h4096-packed.sqlite.gz")])
    for lane in report.lanes:
        exposed = exposed_by_step(lane)
        for mode in ("sync", "merged", "overlap", "prefetch", "prefetch:process_group"):
            steps = np.array([step.schedule == mode for step in lane.steps])
            rows = [
                r for r in report.rows if (r.device, r.schedule, r.kind) == (lane.label, mode, "exchange")
            ]
            assert exposed[steps].sum() == pytest.approx(sum(row.exposed_us for row in rows))
