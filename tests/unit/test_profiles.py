"""The report on profiles made by hand: what is counted as communication, as compute, as hidden."""

from __future__ import annotations

import json

import pytest

from overlap_mtp.profiling import Report, read_profile, report_on

from handmade import Process, Span, Work, kineto_document, write_kineto, write_nsys

FORMATS = ["nsys", "kineto"]


def report(tmp_path, form: str, *processes: Process, ranks: bool = False) -> Report:
    if form == "nsys":
        return report_on([read_profile(write_nsys(tmp_path / "all.sqlite", processes))])
    paths = [
        write_kineto(tmp_path / f"r{i}.json", process, i if ranks else None)
        for i, process in enumerate(processes)
    ]
    return report_on([read_profile(path) for path in paths])


def row(found: Report, device: str, schedule: str, name: str):
    (one,) = [r for r in found.rows if (r.device, r.schedule, r.range) == (device, schedule, name)]
    return one


def schedule(found: Report, name: str):
    (one,) = [s for s in found.schedules if s.name == name]
    return one


def rank(number: int, late: float = 0.0) -> Process:
    """Steps `prefetch`, `sync` and `prepared` of 100, 140 and 90 µs; `late` delays rank 1 in the exchanges."""
    message = number << 48 | 2 << 40 | 4096

    def spans(name: str, at: float, *more: Span) -> list[Span]:
        whole = [("step " + name, 0, 40), ("trunk", 1, 20), ("depth 1", 21, 25), ("depth 2", 26, 30)]
        return [Span(f"{text} r{number}", at + a, at + b) for text, a, b in whole] + list(more)

    def on(at: float, text: str, a: float, b: float, **more: int) -> Span:
        return Span(f"{text} r{number}", at + a, at + b, **more)

    def work(at: float, *each: tuple) -> list[Work]:
        return [Work(name, at + a, at + b, at + c, *more) for name, a, b, c, *more in each]

    nccl = "ncclDevKernel_SendRecv"
    exchange = [
        on(1000, "pack", 2, 3),
        on(1000, "send-recv", 3, 5, payload=message),
        on(1000, "join", 22, 24),
        on(1000, "unroll", 22, 23),
        on(1000, "backward", 31, 39, thread=2),
    ]
    prefetch = work(
        1000,
        ("pack_kernel", 2.5, 10, 14, 20),  # 4 µs, of which the gemm hides 3
        ("ncclKernel_or_triton_put", 3.5, 14, 24 - late, 20),  # 10 µs, hidden up to 20
        ("gemm", 1.5, 11, 20),
        ("ncclDevKernel_AllGather", 10, 25, 35),  # of the trunk: hides nothing
        ("unroll_kernel", 22.5, 40, 42),
        ("layer", 24.5, 42, 60),
        ("ncclDevKernel_ReduceScatter", 32, 70, 80, 7, 2),  # on the thread of autograd
        ("backward_kernel", 33, 80, 109.5, 7, 2),
        ("Memset", 33, 109.5, 110, 7, 2),
        ("Memcpy HtoD", 34, 15, 17, 9, 1, 8),  # neither hides nor is hidden
    )
    messages = [on(2000, "send-recv", 22, 23, payload=message)]
    sync = work(2000, ("gemm", 1.5, 10, 60), (nccl, 22.5, 60, 100 - late), ("layer", 24.5, 100, 150))
    prepared = work(3000, ("gemm", 1.5, 10, 60), ("layer", 24.5, 60, 100))
    return Process(
        pid=500 + number,
        spans=spans("prefetch", 1000, *exchange) + spans("sync", 2000, *messages) + spans("prepared", 3000),
        work=prefetch + sync + prepared,
        extra_calls=[(1005, 1)],
    )


@pytest.mark.parametrize("form", FORMATS)
def test_known_answer(tmp_path, form):
    found = report(tmp_path, form, rank(0), rank(1, late=2))
    assert [one.label for one in found.timelines] == ["rank 0", "rank 1"]

    sent = row(found, "rank 0", "prefetch", "send-recv")
    assert (sent.kind, sent.steps, sent.launches) == ("exchange", 1, 1)
    assert (sent.time_us, sent.hidden_us, sent.exposed_us) == (10, 6, 4)
    assert sent.hidden_fraction == 0.6
    assert sent.peer_wait_us == 2  # rank 1 came 2 µs later, and took 8
    assert row(found, "rank 1", "prefetch", "send-recv").peer_wait_us == 0
    assert sent.bytes == (4096 if form == "nsys" else None)  # record_function has no payload

    packed = row(found, "rank 0", "prefetch", "pack")
    assert (packed.time_us, packed.hidden_us, packed.peer_wait_us) == (4, 3, None)
    unrolled = row(found, "rank 0", "prefetch", "unroll")
    assert (unrolled.kind, unrolled.time_us, unrolled.hidden_us) == ("local", 2, None)
    gathered = row(found, "rank 0", "prefetch", "trunk")
    assert (gathered.kind, gathered.time_us, gathered.hidden_us) == ("model", 10, 0)
    assert row(found, "rank 0", "prefetch", "backward").time_us == 10
    assert row(found, "rank 0", "sync", "send-recv").hidden_fraction == 0

    prefetch = schedule(found, "prefetch")
    assert prefetch.exchange_hidden == pytest.approx((9 + 9) / (14 + 12))
    assert prefetch.exchange_worst == pytest.approx(9 / 14)
    assert prefetch.all_hidden == pytest.approx((9 + 9) / (34 + 32))
    assert found.judged() == ("the exchange in prefetch steps", pytest.approx(9 / 14))
    assert (prefetch.step_ms, schedule(found, "sync").step_ms) == (0.1, 0.14)
    assert prefetch.efficiency == pytest.approx(1 - 10 / 50)
    assert schedule(found, "sync").efficiency == 0
    assert schedule(found, "prepared").efficiency is None
    assert schedule(found, "prepared").all_hidden is None
    assert found.notes == ()
    assert found.as_json()["rows"][0]["device"] == "rank 0"


@pytest.mark.parametrize("form", FORMATS)
def test_a_profile_of_another_project(tmp_path, form):
    spans = [Span("forward [1/2]", 0, 50, domain=None), Span("ncclAllReduce", 10, 12, domain="NCCL")]
    work = [
        Work("gemm", 1, 10, 30),
        Work("ncclDevKernel_AllReduce_Sum", 11, 20, 40, stream=20, num_bytes=800),
        Work("Memcpy PtoP", 13, 40, 50, stream=21, num_bytes=64),
        Work("Memcpy DtoD", 14, 45, 47, stream=7, num_bytes=64),
        Work("ncclDevKernel_Broadcast", 90, 100, 110),
    ]
    found = report(tmp_path, form, Process(pid=77, spans=spans, work=work, device=3))
    device = "process 77 device 3"
    in_range = row(found, device, "all", "forward [1/2]")
    assert (in_range.time_us, in_range.hidden_us, in_range.launches, in_range.steps) == (30, 12, 2, 0)
    assert in_range.bytes == (864 if form == "kineto" else 64)
    assert row(found, device, "all", "no range").time_us == 10
    assert found.judged() == ("all communication", pytest.approx(12 / 40))
    assert "told by name alone" in found.notes[0]


def test_ranges_that_look_like_ours_but_are_of_another_domain_are_not(tmp_path):
    spans = [Span("unroll r0", 0, 50, domain="other")]
    work = [Work("ncclDevKernel_AllReduce", 11, 20, 40), Work("gemm", 1, 20, 30, stream=9)]
    found = report(tmp_path, "nsys", Process(pid=77, spans=spans, work=work))
    assert row(found, "process 77 device 0", "all", "unroll r0").hidden_us == 10


@pytest.mark.parametrize("form", FORMATS)
def test_an_exchange_without_steps(tmp_path, form):
    """The library in another training loop: there is no range `step`."""
    spans = [Span("send-recv r3", 0, 5), Span("join r3", 8, 9)]
    work = [
        Work("triton_put", 1, 10, 30, stream=9),
        Work("gemm", 6, 10, 25),
        Work("unroll_kernel", 8.5, 26, 30),
    ]
    found = report(tmp_path, form, Process(pid=77, spans=spans, work=work))
    assert row(found, "rank 3", "all", "send-recv").hidden_us == 15
    assert row(found, "rank 3", "all", "join").kind == "local"
    assert found.judged() == ("the exchange", 0.75)


def test_a_rank_that_only_the_trace_knows(tmp_path):
    work = [Work("ncclDevKernel_AllReduce", 11, 20, 40)]
    found = report(tmp_path, "kineto", Process(7, work=work), Process(8, work=work), ranks=True)
    assert [one.device for one in found.rows] == ["rank 0", "rank 1"]
    assert found.rows[0].peer_wait_us == 0


def test_the_worst_of_several_transports_is_judged(tmp_path):
    spans, work = [], []
    for at, mode, hidden in (
        (0, "prefetch:symmetric", 8),
        (100, "prefetch:process_group", 3),
        (200, "sync", 0),
    ):
        spans += [Span(f"step {mode} r0", at, at + 50), Span("send-recv r0", at, at + 10)]
        work += [Work("put", at + 1, at + 20, at + 30, 9), Work("gemm", at + 15, at + 20, at + 20 + hidden)]
    found = report(tmp_path, "nsys", Process(77, spans, work))
    assert found.judged() == ("the exchange in prefetch steps", 0.3)


@pytest.mark.parametrize("captured", [True, False])
def test_kernels_of_a_cuda_graph(tmp_path, captured):
    """Nodes share the correlation of the graph's launch; their range is the one that they were captured in."""
    spans = [
        *[Span("pack r0", 10, 20), Span("send-recv r0", 30, 40)],
        *[Span("step prefetch r0", 100, 200), Span("step prefetch r0", 300, 400)],
    ]
    nodes = [(1, None, 15.0), (2, None, 35.0), (3, None, 50.0), (11, 1, 60.0), (12, 2, 60.0), (13, 3, 60.0)]
    work = []
    for launch, at in ((1, 100), (2, 300)):
        for node, name, a, b in (
            (11, "triton_pack", 20, 30),
            (12, "triton_put", 30, 40),
            (13, "gemm", 25, 40),
        ):
            stream = 7 if node == 13 else 9
            work.append(Work(name, at + 5, at + a, at + b, stream, graph_node=node, correlation=launch))
    process = Process(pid=77, spans=spans, work=work, nodes=nodes if captured else ())
    found = report(tmp_path, "nsys", process)
    if not captured:  # nothing tells what the Triton kernels are, and that is said
        assert found.rows == ()
        assert "No communication" in found.notes[0]
        assert "6 kernels are of CUDA graphs" in found.notes[1]
        return
    assert row(found, "rank 0", "prefetch", "pack").hidden_us == 2 * 5
    sent = row(found, "rank 0", "prefetch", "send-recv")
    assert (sent.hidden_us, sent.launches, sent.steps) == (2 * 10, 2, 2)


def test_a_graph_that_is_launched_in_an_exchange_belongs_to_it(tmp_path):
    """The library launches its kernels as graphs of their own, which it made anywhere."""
    spans = [Span("trunk r0", 0, 20), Span("send-recv r0", 100, 110, payload=80)]
    spans += [Span("send-recv r0", 200, 210, payload=80), Span("trunk r0", 90, 220)]
    work = [
        Work("triton_put", at + 5, at + 20, at + 30, 9, graph_node=11, correlation=at) for at in (100, 200)
    ]
    nodes = [(1, None, 15.0), (11, 1, 16.0)]
    found = report(tmp_path, "nsys", Process(pid=77, spans=spans, work=work, nodes=nodes))
    assert [(one.range, one.kind, one.launches, one.bytes) for one in found.rows] == [
        ("send-recv", "exchange", 2, 160)
    ]


def test_bytes_of_a_captured_exchange_count_in_each_replay(tmp_path):
    spans = [Span("send-recv r0", 0, 20, payload=80)]
    work = [
        Work("triton_put", at, at + 20, at + 30, 9, graph_node=11, correlation=at) for at in (100, 200, 300)
    ]
    nodes = [(1, None, 15.0), (11, 1, 30.0)]
    found = report(tmp_path, "nsys", Process(pid=77, spans=spans, work=work, nodes=nodes))
    assert [(one.range, one.launches, one.bytes) for one in found.rows] == [("send-recv", 3, 240)]


def test_graphs_without_their_kernels(tmp_path):
    """Known in an exchange; elsewhere they may hold anything, so that they neither hide nor are hidden."""
    spans = [Span("send-recv r0", 0, 10)]
    work = [Work("CUDA graph", 5, 20, 30, stream=9), Work("CUDA graph", 15, 20, 40), Work("gemm", 16, 20, 24)]
    found = report(tmp_path, "nsys", Process(pid=77, spans=spans, work=work))
    assert [(one.range, one.hidden_us) for one in found.rows] == [("send-recv", 4)]
    assert "--cuda-graph-trace=node" in found.notes[-1]


def test_processes_with_equal_correlations_and_devices_are_kept_apart(tmp_path):
    first = Process(5, [Span("send-recv r0", 0, 10)], [Work("a", 5, 20, 30, correlation=9)])
    second = Process(6, [Span("trunk r1", 0, 10)], [Work("b", 5, 20, 30, correlation=9)])
    found = report(tmp_path, "nsys", first, second)
    assert [(one.device, one.range, one.hidden_us) for one in found.rows] == [("rank 0", "send-recv", 0)]


def test_two_recordings_at_once_are_told_apart(tmp_path):
    paths = [write_nsys(tmp_path / f"{name}.sqlite", [rank(0), rank(1)]) for name in ("one", "two")]
    found = report_on([read_profile(path) for path in paths])
    assert [one.label for one in found.timelines] == [
        f"{name}.sqlite: rank {number}" for name in ("one", "two") for number in (0, 1)
    ]


def test_peer_wait_is_not_made_up_where_ranks_communicate_unequally(tmp_path):
    busy = Process(6, [Span("trunk r1", 0, 10)], [Work("ncclA", 5, 20, 30), Work("ncclA", 6, 30, 40)])
    found = report(tmp_path, "nsys", Process(5, [Span("trunk r0", 0, 10)], [Work("ncclA", 5, 20, 50)]), busy)
    assert {one.peer_wait_us for one in found.rows} == {None}


def test_efficiency_needs_sync_and_prepared(tmp_path):
    process = rank(0)
    steps = [span for span in process.spans if not span.text.startswith("step sync")]
    found = report(tmp_path, "nsys", Process(5, steps, process.work))
    assert schedule(found, "prefetch").efficiency is None
    assert "No overlap efficiency" in found.notes[-1]


def test_an_old_trace_with_other_categories_and_no_header(tmp_path):
    document = kineto_document(rank(0))
    renamed = {"kernel": "Kernel", "gpu_memcpy": "Memcpy", "gpu_memset": "Memset", "cuda_runtime": "Runtime"}
    for event in document["traceEvents"]:
        event["cat"] = renamed.get(event.get("cat"), event.get("cat"))
    path = tmp_path / "old.json"
    path.write_text(json.dumps(document["traceEvents"]))  # a bare list of events
    found = report_on([read_profile(path)])
    assert row(found, "rank 0", "prefetch", "send-recv").hidden_us == 6


@pytest.mark.parametrize("kind", ["ours", "foreign", "quiet"])
def test_the_plot_is_drawn_of_whatever_there_is(tmp_path, kind):
    from matplotlib import image

    from overlap_mtp.profiling.plot import plot

    foreign = [Work("ncclDevKernel_AllReduce", 1, 10, 30), Work("gemm", 2, 20, 40, stream=9)]
    process = rank(0) if kind == "ours" else Process(5, work=foreign[1:] if kind == "quiet" else foreign)
    found = report(tmp_path, "nsys", process)
    plot(found.timelines, tmp_path / "timeline.png")
    height, width, _ = image.imread(tmp_path / "timeline.png").shape
    assert width > height > 200
