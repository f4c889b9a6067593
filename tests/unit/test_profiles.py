"""The report on profiles made by hand: what counts as communication, as compute, as hidden."""

import json
from pathlib import Path

import pytest

from overlap_mtp.profiling import Report, read_profile, report_on

from handmade import Process, Span, Work, kineto_document, write_kineto, write_nsys

both_formats = pytest.mark.parametrize("form", ["nsys", "kineto"])


def report(tmp_path, form: str, *processes: Process) -> Report:
    if form == "nsys":
        paths = [write_nsys(tmp_path / "all.sqlite", processes)]
    else:
        paths = [write_kineto(tmp_path / f"{i}.json", process) for i, process in enumerate(processes)]
    return report_on([read_profile(path) for path in paths])


def rows(found: Report, *fields: str) -> list[tuple]:
    return [tuple(getattr(row, field) for field in fields) for row in found.rows]


def rank(number: int, late: float = 0.0) -> Process:
    """Steps `prefetch`, `sync` and `prepared` of 100, 140 and 90 µs; `late` delays rank 1 in the exchanges."""
    message = number << 48 | 2 << 40 | 4096
    spans, work = [], []

    def step(at: float, name: str, ranges: list[tuple], kernels: list[tuple]) -> None:
        whole = [(f"step {name}", 0, 40), ("trunk", 1, 20), ("depth 1", 21, 25), ("depth 2", 26, 30)]
        for text, a, b, *more in whole + ranges:
            spans.append(Span(f"{text} r{number}", at + a, at + b, *more))
        for text, a, b, c, *more in kernels:
            work.append(Work(text, at + a, at + b, at + c, *more))

    ranges = [("pack", 2, 3), ("send-recv", 3, 5, 1, message), ("join", 22, 24), ("unroll", 22, 23)]
    kernels = [
        ("pack_kernel", 2.5, 10, 14, 20),  # 4 µs; the gemm hides 3 of them
        ("ncclKernel_or_triton_put", 3.5, 14, 24 - late, 20),  # 10 µs, hidden up to 20
        ("gemm", 1.5, 11, 20),
        ("ncclDevKernel_AllGather", 10, 25, 35),  # of the trunk: hides nothing
        ("unroll_kernel", 22.5, 40, 42),
        ("layer", 24.5, 42, 60),
        ("ncclDevKernel_ReduceScatter", 32, 70, 80, 7, 2),  # on the thread of autograd
        ("backward_kernel", 33, 80, 109.5, 7, 2),
        ("Memset", 33, 109.5, 110, 7, 2),
        ("Memcpy HtoD", 34, 15, 17, 9, 1, 8),  # neither hides nor is hidden
    ]
    step(1000, "prefetch", [*ranges, ("backward", 31, 39, 2)], kernels)
    gemm, layer = ("gemm", 1.5, 10, 60), ("layer", 24.5, 100, 150)
    message_kernel = ("ncclDevKernel_SendRecv", 22.5, 60, 100 - late)
    step(2000, "sync", [("send-recv", 22, 23, 1, message)], [gemm, message_kernel, layer])
    step(3000, "prepared", [], [gemm, ("layer", 24.5, 60, 100)])
    return Process(500 + number, spans, work, extra_calls=[1005])


@both_formats
def test_known_answer(tmp_path, form):
    found = report(tmp_path, form, rank(0), rank(1, late=2))
    assert [one.label for one in found.timelines] == ["rank 0", "rank 1"]
    sent = 4096 if form == "nsys" else None  # record_function has no payload
    fields = ("schedule", "range", "kind", "time_us", "hidden_us", "exposed_us", "peer_wait_us", "bytes")
    assert rows(found, *fields)[:6] == [
        ("sync", "send-recv", "exchange", 40, 0, 40, 2, sent),  # rank 1 came 2 µs later, and took 38
        ("prefetch", "pack", "exchange", 4, 3, 1, None, None),
        ("prefetch", "send-recv", "exchange", 10, 6, 4, 2, sent),
        ("prefetch", "trunk", "model", 10, 0, 10, 0, None),
        ("prefetch", "backward", "model", 10, 0, 10, 0, None),
        ("prefetch", "unroll", "local", 2, None, None, None, None),
    ]
    assert {(row.steps, row.launches) for row in found.rows} == {(1, 1)}
    assert found.rows[2].hidden_fraction == 0.6
    assert [row.peer_wait_us for row in found.rows[6:]] == [0, None, 0, 0, 0, None]

    sync, prefetch, prepared = found.schedules
    step_ms = {one.name: one.step_ms for one in found.schedules}
    assert step_ms == {"sync": 0.14, "prefetch": 0.1, "prepared": 0.09}
    assert prefetch.exchange_hidden == pytest.approx((9 + 9) / (14 + 12))
    assert prefetch.exchange_worst == pytest.approx(9 / 14)
    assert prefetch.exchange_mean == pytest.approx((9 / 14 + 9 / 12) / 2)
    assert prefetch.exchange_p10 == pytest.approx(
        0.9 * 9 / 14 + 0.1 * 9 / 12
    )  # between the steps of two ranks
    assert (prefetch.exchange_least, prepared.exchange_least) == (pytest.approx(9 / 14), None)
    assert prefetch.all_hidden == pytest.approx((9 + 9) / (34 + 32))
    assert found.judged() == ("the exchange in prefetch steps", pytest.approx(9 / 14))
    assert prefetch.efficiency == pytest.approx(1 - 10 / 50)
    assert (sync.efficiency, prepared.efficiency, prepared.all_hidden) == (0, None, None)
    assert found.notes == ()
    assert found.as_json()["rows"][0]["device"] == "rank 0"


@both_formats
def test_an_exchange_of_gradients_has_rows_of_its_own(tmp_path, form):
    """Activations travel in the forward pass, and their gradients in the backward pass, on the thread of autograd."""

    def one(number: int) -> Process:
        def ranges(at: int, thread: int) -> list[Span]:
            named = [("pack", 0, 1), ("send-recv", 1, 2), ("join", 8, 10), ("unroll", 9, 10)]
            return [Span(f"{text} r{number}", at + a, at + b, thread) for text, a, b in named]

        spans = [
            *[Span(f"step overlap r{number}", 0, 100), Span(f"trunk r{number}", 1, 40)],
            *[Span(f"backward r{number}", 50, 90, 2), *ranges(5, 1), *ranges(55, 2)],
        ]
        forward = [
            ("pack_rows", 5.5, 20, 24, 9),
            ("ncclDevKernel_SendRecv", 6.5, 24, 34, 9),
            ("gemm", 7.5, 20, 30),
        ]
        forward += [("unroll_received_rows", 14.5, 40, 42)]
        backward = [("pack_sums", 55.5, 100, 102, 9), ("ncclDevKernel_SendRecv", 56.5, 102, 112, 9)]
        backward += [("gemm", 58, 100, 112), ("add_rows", 64.5, 112, 115)]
        work = [Work(*each) for each in forward] + [
            Work(*each, *([] if len(each) == 5 else [7]), 2) for each in backward
        ]
        return Process(500 + number, spans, work)

    found = report(tmp_path, form, one(0), one(1))
    assert rows(found, "range", "kind", "time_us", "hidden_us")[:6] == [
        ("pack", "exchange", 4, 4),
        ("send-recv", "exchange", 10, 6),
        ("pack in backward", "exchange", 2, 2),
        ("send-recv in backward", "exchange", 10, 10),
        ("unroll", "local", 2, None),
        ("unroll in backward", "local", 3, None),
    ]
    assert found.schedules[0].exchange_hidden == pytest.approx(22 / 26)
    assert [row.peer_wait_us for row in found.rows[:4]] == [None, 0, None, 0]


@both_formats
def test_a_profile_of_another_project(tmp_path, form):
    spans = [Span("forward [1/2]", 0, 50, domain=None), Span("ncclAllReduce", 10, 12, domain="NCCL")]
    work = [
        Work("gemm", 1, 10, 30),
        Work("ncclDevKernel_AllReduce_Sum", 11, 20, 40, stream=20, num_bytes=800),
        Work("Memcpy PtoP", 13, 40, 50, stream=21, num_bytes=64),
        Work("Memcpy DtoD", 14, 45, 47, stream=7, num_bytes=64),
        Work("ncclDevKernel_Broadcast", 90, 100, 110),
    ]
    found = report(tmp_path, form, Process(77, spans, work, device=3))
    assert {(row.device, row.schedule, row.steps) for row in found.rows} == {
        ("process 77 device 3", "all", 0)
    }
    assert rows(found, "range", "time_us", "hidden_us", "launches", "bytes") == [
        ("forward [1/2]", 30, 12, 2, 864 if form == "kineto" else 64),
        ("no range", 10, 0, 1, None),
    ]
    assert found.judged() == ("all communication", pytest.approx(12 / 40))
    assert "told by name alone" in found.notes[0]


def test_ranges_that_look_like_ours_but_are_of_another_domain_are_not(tmp_path):
    work = [Work("ncclDevKernel_AllReduce", 11, 20, 40), Work("gemm", 1, 20, 30, stream=9)]
    found = report(tmp_path, "nsys", Process(77, [Span("unroll r0", 0, 50, domain="other")], work))
    assert rows(found, "device", "range", "hidden_us") == [("process 77 device 0", "unroll r0", 10)]


@both_formats
def test_an_exchange_without_steps(tmp_path, form):
    """The library in another training loop: there is no range `step`."""
    spans = [Span("send-recv r3", 0, 5), Span("join r3", 8, 9)]
    work = [Work("put", 1, 10, 30, 9), Work("gemm", 6, 10, 25), Work("unroll_kernel", 8.5, 26, 30)]
    found = report(tmp_path, form, Process(77, spans, work))
    assert rows(found, "device", "range", "kind", "hidden_us") == [
        ("rank 3", "send-recv", "exchange", 15),
        ("rank 3", "join", "local", None),
    ]
    assert found.judged() == ("the exchange", 0.75)


def test_a_rank_that_only_the_trace_knows(tmp_path):
    work = [Work("ncclDevKernel_AllReduce", 11, 20, 40)]
    paths = [write_kineto(tmp_path / f"{i}.json", Process(7 + i, work=work), i) for i in range(2)]
    found = report_on([read_profile(path) for path in paths])
    assert rows(found, "device", "peer_wait_us") == [("rank 0", 0), ("rank 1", 0)]


def test_the_worst_of_several_transports_is_judged_and_none_without_prefetch(tmp_path):
    spans, work = [], []
    hidden = {"prefetch:symmetric": 8, "prefetch:process_group": 3, "sync": 0}
    for at, schedule in zip((0, 100, 200), hidden, strict=True):
        spans += [Span(f"step {schedule} r0", at, at + 50), Span("send-recv r0", at, at + 10)]
        work.append(Work("put", at + 1, at + 20, at + 30, 9))
        work.append(Work("gemm", at + 15, at + 20, at + 20 + hidden[schedule]))
    what = "the exchange in prefetch steps"
    found = report(tmp_path, "nsys", Process(77, spans, work))
    assert found.judged() == (what, 0.3)
    assert {one.efficiency for one in found.schedules} == {None}
    assert found.notes == ("No overlap efficiency: it needs steps of sync and of prepared.",)
    (tmp_path / "all.sqlite").unlink()
    assert report(tmp_path, "nsys", Process(77, spans[-2:], work[-2:])).judged() == (what, None)


def test_what_is_judged_comes_with_the_time_at_the_join(tmp_path):
    """Over the ranges and both directions of the slowest device, in a mean step of the judged schedule."""
    processes = []
    for number in (0, 1):
        spans, work = [], []
        for at, name in ((0, "prefetch"), (1000, "prefetch"), (2000, "sync")):
            spans += [Span(f"step {name} r{number}", at, at + 900), Span(f"unroll r{number}", at + 1, at + 3)]
            spans += [
                Span(f"backward r{number}", at + 10, at + 50),
                Span(f"join r{number}", at + 11, at + 13),
            ]
            work += [
                Work("wait", at + 2, at + 20, at + 60 + 10 * number),
                Work("add", at + 12, at + 100, at + 108),
            ]
        processes.append(Process(500 + number, spans, work, device=number))
    assert report(tmp_path, "nsys", *processes).join_us() == 50 + 8
    (tmp_path / "all.sqlite").unlink()
    whole = Process(5, [Span("unroll r0", 0, 9)], [Work("wait", 1, 2, 9), Work("wait", 2, 10, 12)])
    assert report(tmp_path, "nsys", whole).join_us() == 9


@pytest.mark.parametrize("others", [0, 1])
def test_a_step_that_the_end_of_the_capture_cuts_off_is_left_out(tmp_path, others):
    """On all ranks, and also from what is outside of steps; if no other is there, nothing can be judged."""
    processes = []
    for number in (0, 1):
        spans, work = [], [Work("gemm", 1, 2, 3)]
        for at, end in ((1000, 2100), (3000, None if number == 0 else 4000))[1 - others :]:
            spans += [Span(f"step prefetch r{number}", at, end), Span(f"send-recv r{number}", at, at + 2)]
            work += [Work("gemm", at + 5, at + 10, at + 210), Work("put", at + 1, at + 100, at + 110, 9)]
            work += [Work("gemm", at + 6, at + 210, at + 1010)] if end else []
        processes.append(Process(500 + number, spans, work, device=number))
    profile = read_profile(write_nsys(tmp_path / "a.sqlite", processes))
    found = report_on([profile], outside_steps=True)
    assert "1 step was cut off by the end of the capture, and left out." in found.notes
    times = {one.name: one.step_ms for one in found.schedules}
    assert times == {"prefetch": 1.0 if others else None}
    assert [(one.device, one.steps, one.communication_us) for one in found.totals] == [
        *[("rank 0", 1, 10)] * others,
        ("rank 1", 1 + others, 10 * (1 + others)),
    ]
    alone = report(tmp_path, "nsys", processes[0])
    assert alone.judged() == ("the exchange in prefetch steps", 1 if others else None)


@pytest.mark.parametrize("captured", [True, False])
def test_kernels_of_a_cuda_graph(tmp_path, captured):
    """Nodes share the correlation of the graph's launch; their range is the one that they were captured in."""
    steps = [Span("step prefetch r0", at, at + 100) for at in (100, 300)]
    spans = [Span("pack r0", 10, 20), Span("send-recv r0", 30, 40), *steps]
    nodes = [(1, None, 15.0), (2, None, 35.0), (3, None, 50.0), (11, 1, 60.0), (12, 2, 60.0), (13, 3, 60.0)]
    kernels = [(11, "triton_pack", 9, 20, 30), (12, "triton_put", 9, 30, 40), (13, "gemm", 7, 25, 40)]
    work = [
        Work(name, at + 5, at + a, at + b, stream, graph_node=node, correlation=at)
        for at in (100, 300)
        for node, name, stream, a, b in kernels
    ]
    found = report(tmp_path, "nsys", Process(77, spans, work, nodes=nodes if captured else ()))
    if captured:
        assert rows(found, "schedule", "range", "hidden_us", "launches", "steps") == [
            ("prefetch", "pack", 2 * 5, 2, 2),
            ("prefetch", "send-recv", 2 * 10, 2, 2),
        ]
    else:  # nothing tells what the Triton kernels are, and the notes say so
        assert found.rows == ()
        assert "No communication" in found.notes[0]
        assert "6 kernels are of CUDA graphs" in found.notes[1]


@pytest.mark.parametrize("captured_in", ["trunk", "send-recv", "nothing recorded"])
def test_each_launch_of_a_graph_counts_its_bytes(tmp_path, captured_in):
    """A graph launched in an exchange belongs to it, as the library's own do, wherever it was captured."""
    if captured_in == "send-recv":
        spans = [Span("send-recv r0", 0, 20, payload=80)]
    else:
        spans = [Span("send-recv r0", at, at + 10, payload=80) for at in (100, 200)]
        spans += [Span("trunk r0", 0, 20), Span("trunk r0", 90, 220)]
    work = [Work("put", at + 5, at + 20, at + 30, 9, graph_node=11, correlation=at) for at in (100, 200)]
    nodes = [] if captured_in == "nothing recorded" else [(1, None, 15.0), (11, 1, 30.0)]
    found = report(tmp_path, "nsys", Process(77, spans, work, nodes=nodes))
    assert rows(found, "range", "kind", "launches", "bytes") == [("send-recv", "exchange", 2, 160)]
    assert found.notes == ()


def test_graphs_without_their_kernels(tmp_path):
    """In an exchange they are known; elsewhere they may hold anything, so they neither hide nor are hidden."""
    work = [Work("CUDA graph", 5, 20, 30, stream=9), Work("CUDA graph", 15, 20, 40), Work("gemm", 16, 20, 24)]
    found = report(tmp_path, "nsys", Process(77, [Span("send-recv r0", 0, 10)], work))
    assert rows(found, "range", "hidden_us") == [("send-recv", 4)]
    assert "--cuda-graph-trace=node" in found.notes[-1]


def test_processes_with_equal_correlations_and_devices_are_kept_apart(tmp_path):
    first = Process(5, [Span("send-recv r0", 0, 10)], [Work("a", 5, 20, 30, correlation=9)])
    second = Process(6, [Span("trunk r1", 0, 10)], [Work("b", 5, 20, 30, correlation=9)])
    found = report(tmp_path, "nsys", first, second)
    assert rows(found, "device", "range", "hidden_us") == [("rank 0", "send-recv", 0)]


def test_two_recordings_at_once_are_told_apart(tmp_path):
    paths = [write_nsys(tmp_path / name, [rank(0), rank(1)]) for name in ("one", "two")]
    labels = [one.label for one in report_on([read_profile(path) for path in paths]).timelines]
    assert labels == ["one: rank 0", "one: rank 1", "two: rank 0", "two: rank 1"]


def steps_of(path: Path, **lengths: int) -> Path:
    """Record rank 0 with one step of each schedule. `lengths`: how many µs each takes."""
    spans = [Span(f"step {name} r0", 5000 * at, 5000 * at + 9) for at, name in enumerate(lengths)]
    starts = [(5000 * at, length) for at, length in enumerate(lengths.values())]
    return write_nsys(
        path, [Process(5, spans, [Work("gemm", at + 1, at + 2, at + 2 + us) for at, us in starts])]
    )


def test_steps_of_two_recordings_are_not_one_step(tmp_path):
    paths = [steps_of(tmp_path / "a", prefetch=1000), steps_of(tmp_path / "b", prefetch=3000)]
    (found,) = report_on([read_profile(path) for path in paths]).schedules
    assert (found.steps, found.step_ms) == (2, 2.0)


def test_efficiency_compares_steps_of_one_recording(tmp_path):
    first = steps_of(tmp_path / "a", sync=1400, prefetch=1000)
    second = steps_of(tmp_path / "b", prepared=900, overlap=1000)
    apart = report_on([read_profile(path) for path in (first, second)])
    assert {one.efficiency for one in apart.schedules} == {None}
    assert "No overlap efficiency of sync, overlap, prefetch: its steps" in apart.notes[-1]
    whole = [steps_of(tmp_path / name, sync=1400, prefetch=1000, prepared=900) for name in "cd"]
    found = report_on([read_profile(path) for path in whole])
    assert [one.efficiency for one in found.schedules] == [0, pytest.approx(1 - 100 / 500), None]
    assert "overlap efficiency" not in " ".join(found.notes)


def test_peer_wait_is_unknown_if_ranks_communicate_unequally(tmp_path):
    first = Process(5, [Span("trunk r0", 0, 10)], [Work("ncclA", 5, 20, 50)])
    second = Process(6, [Span("trunk r1", 0, 10)], [Work("ncclA", 5, 20, 30), Work("ncclA", 6, 30, 40)])
    assert rows(report(tmp_path, "nsys", first, second), "peer_wait_us") == [(None,), (None,)]


def test_an_old_trace_with_other_categories_and_no_header(tmp_path):
    events = json.dumps(kineto_document(rank(0))["traceEvents"])
    for new, old in {"kernel": "Kernel", "gpu_mem": "Mem", "cuda_runtime": "Runtime"}.items():
        events = events.replace(f'"cat": "{new}', f'"cat": "{old}')
    (tmp_path / "old.json").write_text(events)
    found = report_on([read_profile(tmp_path / "old.json")])
    assert rows(found, "schedule", "range", "hidden_us")[2] == ("prefetch", "send-recv", 6)


FIRST_STREAM, WHOLE = "compute\n(stream 9)", ("whole profile", "whole profile")
PICTURES = {  # title, first and last schedule, streams of the last
    "ours": (
        "The exchange beside compute in one step of each schedule (rank 0 of all.sqlite)",
        ("sync", "prefetch"),
        ["compute\n(stream 7)", "exchange\n(stream 20)", "other\n(stream 9)"],
    ),
    "foreign": (
        "Communication beside compute in the whole profile (process 5 device 0 of all.sqlite)",
        WHOLE,
        [FIRST_STREAM, "communication\n(stream 7)"],
    ),
    "quiet": (
        "Communication beside compute in the whole profile (process 5 device 0 of all.sqlite)",
        WHOLE,
        [FIRST_STREAM],
    ),
}


def test_schedules_of_activations_are_plotted_over_each_transport(tmp_path):
    from overlap_mtp.profiling.plot import draw

    names = ["none", "overlap:symmetric", "merged", "overlap:process_group"]
    spans = [Span(f"step {name} r0", 100 * at, 100 * at + 50) for at, name in enumerate(names)]
    work = [Work("gemm", 100 * at + 1, 100 * at + 10, 100 * at + 40) for at in range(len(names))]
    figure = draw(report(tmp_path, "nsys", Process(5, spans, work)).timelines)
    titles = [axes.get_title(loc="left").rsplit(": ", 1)[0] for axes in figure.axes[::2]]
    assert titles == ["merged", "overlap:process_group", "overlap:symmetric"]


@pytest.mark.parametrize("kind", PICTURES)
def test_every_kind_of_profile_is_plotted(tmp_path, kind):
    from matplotlib import image

    from overlap_mtp.profiling.plot import draw, plot

    foreign = [Work("ncclDevKernel_AllReduce", 1, 10, 30), Work("gemm", 2, 20, 40, stream=9)]
    process = rank(0) if kind == "ours" else Process(5, work=foreign[1:] if kind == "quiet" else foreign)
    timelines = report(tmp_path, "nsys", process).timelines
    figure = draw(timelines)
    title, (first, last), streams = PICTURES[kind]
    assert figure.get_suptitle() == title
    titles = [axes.get_title(loc="left").split(":")[0] for axes in figure.axes[::2]]
    assert (titles[0], titles[-1]) == (first, last)
    assert [label.get_text() for label in figure.axes[-2].get_yticklabels()[1:]] == streams
    plot(timelines, tmp_path / "timeline.png")
    height, width, _ = image.imread(tmp_path / "timeline.png").shape
    assert width > height > 200
