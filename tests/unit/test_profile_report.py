"""What a report shows first, in which order, and what it leaves out."""

from __future__ import annotations

from dataclasses import astuple
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from overlap_mtp import SCHEDULES
from overlap_mtp.profiling import Report, read_profile, report_on
from overlap_mtp.profiling.schedule_names import USUAL_ORDER, in_usual_order
from overlap_mtp.profiling.tables import tables

from handmade import Process, Span, Work, write_nsys


def recording(folder, *schedules: str, scale: float = 1) -> Report:
    """Two steps of each schedule and work before them. Of an exchange of 10 µs, compute covers 4 µs on rank 0."""
    processes = []
    for rank in (0, 1):
        spans, work = [], [Work("ncclDevKernel_Warmup", 1, 5, 45), Work("gemm", 2, 5, 15, stream=9)]
        for number, schedule in enumerate(schedules * 2):
            at = 100 * scale * (number + 1)
            spans += [Span(f"step {schedule} r{rank}", at, at + 90 * scale)]
            spans += [Span(f"pack r{rank}", at + 1, at + 2), Span(f"send-recv r{rank}", at + 3, at + 4)]
            work += [Work("pack_kernel", at + 1.5, at + 8, at + 9, 9), Work("gemm", at + 5, at + 5, at + 14)]
            work += [Work("put", at + 3.5, at + 10 + 2 * rank, at + 10 + 10 * scale, 9)]
            work += [Work("ncclDevKernel_AllGather", at + 6, at + 30, at + 30 + 5 * scale)]
        processes.append(Process(500 + rank, spans, work, device=rank))
    return report_on([read_profile(write_nsys(folder / "all.sqlite", processes))])


def printed(report: Report, width: int) -> str:
    console = Console(width=width, file=StringIO(), markup=False, highlight=False)
    for table in tables(report, console.width):
        console.print(table, crop=False)
    return console.file.getvalue()


def test_schedules_come_in_the_order_of_the_library():
    assert [name for name in USUAL_ORDER if name in SCHEDULES] == list(SCHEDULES)
    others = ["outside steps", "none", "own", "prefetch:symmetric", "a", "own", "sync", "prefetch", "batched"]
    assert in_usual_order([*others, "overlap", "prepared", "merged", "prefetch:process_group"]) == [
        *("sync", "merged", "batched", "overlap", "prefetch", "prefetch:process_group", "prefetch:symmetric"),
        *("prepared", "none", "own", "a", "outside steps"),
    ]


def test_each_device_has_a_total_for_each_schedule(tmp_path):
    found = recording(tmp_path, "prefetch:symmetric", "sync")
    assert [one.name for one in found.schedules] == ["sync", "prefetch:symmetric"]
    assert [astuple(total) for total in found.totals] == [
        # communication, hidden, exposed, hidden fraction, peer wait, compute of two steps; `pack` waits for nobody
        ("rank 0", "sync", 2, 32, 10, 22, 10 / 32, 4, 18),
        ("rank 0", "prefetch:symmetric", 2, 32, 10, 22, 10 / 32, 4, 18),
        ("rank 1", "sync", 2, 28, 6, 22, 6 / 28, 0, 18),
        ("rank 1", "prefetch:symmetric", 2, 28, 6, 22, 6 / 28, 0, 18),
    ]
    assert found.as_json()["totals"][0] == {
        **{"device": "rank 0", "schedule": "sync", "steps": 2, "communication_us": 32, "hidden_us": 10},
        **{"exposed_us": 22, "hidden_fraction": 10 / 32, "peer_wait_us": 4, "compute_us": 18},
    }


def test_a_total_does_not_know_the_wait_of_a_kernel_without_its_peer(tmp_path):
    found = recording(tmp_path, "sync")
    alone = write_nsys(
        tmp_path / "alone", [Process(5, [Span("trunk r0", 0, 9)], [Work("ncclAllGather", 1, 5, 9)])]
    )
    assert [total.peer_wait_us for total in found.totals] == [4, 0]
    assert [total.peer_wait_us for total in report_on([read_profile(alone)]).totals] == [None]


def test_every_field_of_the_json_is_documented(tmp_path):
    found = recording(tmp_path, "sync").as_json()
    fields = {*found, *(field for name in ("schedules", "totals", "rows") for field in found[name][0])}
    page = (Path(__file__).parents[2] / "profiles/README.md").read_text()
    assert [field for field in sorted(fields) if f"`{field}`" not in page] == []
    assert f"`version` ({found['version']})" in page


def test_what_is_outside_of_steps_is_reported_if_asked_for(tmp_path):
    found = recording(tmp_path, "sync")
    assert "outside steps" not in str(found.as_json())
    assert "--outside-steps shows it" in " ".join(printed(found, 80).split())
    everything = report_on([found.timelines[0].profile], outside_steps=True)
    assert [total for total in everything.totals if total.schedule != "outside steps"] == list(found.totals)
    outside = [total for total in everything.totals if total.schedule == "outside steps"]
    assert [(total.steps, total.communication_us, total.hidden_us) for total in outside] == [(0, 40, 10)] * 2
    assert everything.schedules[-1].name == "outside steps"
    assert "--outside-steps" not in printed(everything, 80)


def test_the_summary_comes_first_then_devices_then_ranges(tmp_path):
    lines = [line.split() for line in printed(recording(tmp_path, "prefetch", "sync"), 80).splitlines()]
    sync = ["sync", "2", "0.030", "40.0", "33.3", "33.3", "26.7", "21.4", "-"]
    order = [["Schedules"], sync, ["rank", "0", "sync", "16.0", "5.0", "11.0", "31.2", "2.0"]]
    order += [["rank", "0", "prefetch", "16.0", "5.0", "11.0", "31.2", "2.0"], ["rank", "0,", "sync"]]
    order += [
        ["send-recv", "exchange", "10.0", "4.0", "6.0", "40.0", "2.0", "1", "-"],
        ["rank", "1,", "sync"],
    ]
    places = [lines.index(line) for line in order]
    assert places == sorted(places)


@pytest.mark.parametrize("width", [80, 60, 20])
def test_tables_cut_no_number(tmp_path, width):
    """A terminal of 80 columns has room for steps of ten seconds; a narrower one gets wider lines."""
    report = recording(tmp_path, "prefetch:process_group", "sync", scale=100_000)
    text = printed(report, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= max(width, 80)
    assert {"1,000.005", "1,000,001.0", "1,000,000.0", "999,996.0", "500,000.0"} <= set(text.split())
