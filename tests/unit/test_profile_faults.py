"""What a profile does not tell is said, and never made up."""

import gzip
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from time import process_time

import numpy as np
import pytest

from overlap_mtp.profiling import ProfileError, json_stream, nsys, read, read_profile, report_on
from overlap_mtp.profiling import trace as profile_columns
from overlap_mtp.profiling.intervals import Nesting, covered, length, merge, merge_each, sum_each
from overlap_mtp.profiling.names import NameKind, kind_of_name
from overlap_mtp.profiling.shrink import main
from overlap_mtp.profiling.trace import UNKNOWN, Kind

from handmade import Process, Span, Work, write_kineto, write_nsys

GEMM, NCCL = "gemm", "ncclDevKernel_AllReduce_Sum_f32_RING_LL"


def event(name, ts, dur, stream=7, device=0, category="kernel", **args):
    where = {"pid": device, "tid": stream, "args": {"device": device, "stream": stream, **args}}
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, **where}


def trace(path, *events, rank=0, world=None, **header):
    info = {"rank": rank} if world is None else {"rank": rank, "world_size": world}
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps({"schemaVersion": 1, "distributedInfo": info, "traceEvents": events, **header})
    )
    return path


def report(*paths):
    return report_on([read_profile(path) for path in paths])


def waits(found):
    return [row.peer_wait_us for row in found.rows]


@pytest.mark.parametrize(
    ("kind", "names"),
    {
        NameKind.COMMUNICATION: [
            *("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "_ZN7mscclpp9allreduceEv"),
            *("c10d::symmetric_memory::barrier_kernel(unsigned int**)", "void f(ncclDevComm)"),
            *(
                "void vllm::cross_device_reduce_2stage<float, 4>(vllm::RankData*)",
                "userbuffers_fp16_sum<8>()",
            ),
            "void flashinfer::trtllm_allreduce_fusion::kernel<8>()",
        ],
        NameKind.EXPERTS: ["void deep_ep::intranode::combine<int, 8>()", "_ZN7deep_ep9internode8dispatchEv"],
        NameKind.SUSPECT: ["dispatch", "mylib::AllGatherRing<4>(int)", "put_pack_kernel", "barrier_kernel"],
        NameKind.COMPUTE: [
            *(
                "gemm",
                "void at::native::index_put_kernel<float>(int)",
                "deep_ep::layout::get_dispatch_layout<4>()",
            ),
            *(
                "triton_poi_fused_all_gather_into_tensor_3",
                "flash_fwd_splitkv_combine_kernel",
                "f<all_reduce>(int)",
            ),
        ],
        NameKind.UNNAMED: [""],
    }.items(),
)
def test_names(kind, names):
    assert {name: kind_of_name(name) for name in names} == dict.fromkeys(names, kind)


EACH = {  # a name for each library, and for each word that sounds like one
    NameKind.COMMUNICATION: """ncclKernel rcclKernel onecclKernel xcclKernel hcclKernel nvshmem_put rocshmem_put
        msccl_run multimem_kernel one_shot_all_reduce_kernel oneShotAllReduceKernel cross_device_reduce_1stage<4>
        custom_all_reduce_kernel f(vllm::RankSignals) f(vllm::Signal*) quick_reduce::twoshot push_pull_halos_1d
        flashinfer::allgather trtllm_allreduce_kernel trtllm::reduce_scatter_kernel
        mnnvl::all_to_all allreduce_fusion_kernel ar_fusion_kernel lamport_kernel user_buffers_sum""",
    NameKind.EXPERTS: """deepep::dispatch hybrid_ep::combine pplx_a2a mooncake_ep_dispatch uccl::dispatch
        mori::EpDispatch moe_a2a_kernel moeAlltoAllKernel moe_comm_kernel""",
    NameKind.SUSPECT: """ring_all_reduce reduce_scatter_2d all_to_all_v sendrecv_kernel a2a_kernel twoShot multicast
        p2p_copy nvlink_copy nvls_sum rdma_read ibgda_poll inter_node_sum intranode_sum cross_gpu_sum peer_copy
        symm_mem_copy halo_exchange put_signal signal_pad x_recv ipc_open barrier put_it broadcast
        x::broadcast_kernel cached_notify_combine SendKernel dispatch<decltype(a->b)>(int)""",
    NameKind.COMPUTE: "broadcast_add_kernel sender_kernel output_kernel combine_heads input_dispatch_table",
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in EACH for name in EACH[kind].split()])
def test_each_library_and_each_suspicious_word_is_known(kind, name):
    assert kind_of_name(name) == kind


def test_what_only_sounds_like_communication_hides_nothing_and_is_listed(tmp_path):
    path = trace(tmp_path / "a.json", event("mylib::all_gather<4>(int)", 0, 10), event(NCCL, 3, 3, 8))
    found = report(path)
    assert [row.hidden_us for row in found.rows] == [0]
    assert "mylib::all_gather" in found.notes[0]
    alone = report(trace(tmp_path / "b.json", event("mylib::all_gather<4>(int)", 0, 10)))
    assert alone.notes[0] == "No kernel is known to be communication, but some cannot be told:"


def test_kernels_without_names_are_not_no_communication(tmp_path):
    path = write_nsys(tmp_path / "a.sqlite", [Process(7, work=[Work(GEMM, 1, 2, 9), Work(NCCL, 1, 3, 6, 8)])])
    with closing(sqlite3.connect(path)) as db:
        db.execute("DROP TABLE StringIds")
    found = report(path)
    assert "2 kernels have no names" in " ".join(found.notes)
    assert "No communication" not in " ".join(found.notes)


def group_of(ranks="[0, 1]", name="1", collective="allreduce"):
    return {"Process Group Name": name, "Process Group Ranks": ranks, "Collective name": collective}


def grouped(folder, rank, times, *group, world=4, **more_of_group):
    more = group_of(*group, **more_of_group)
    kernels = [event(NCCL, ts, dur, 8, rank, **more) for ts, dur in times]
    return trace(folder / f"rank{rank}.json", event(GEMM, 0, 1000, 7, rank), *kernels, rank=rank, world=world)


def test_messages_of_experts_are_communication_of_their_own_kind(tmp_path):
    kernel = event("void deep_ep::intranode::combine<8>()", 3, 6, 8)
    found = report(trace(tmp_path / "a.json", event(GEMM, 0, 5), kernel))
    assert [(row.kind, row.hidden_us, row.exposed_us) for row in found.rows] == [("experts", 2, 4)]
    assert found.totals[0].communication_us == 6


def test_a_kernel_that_torch_calls_a_collective_is_communication(tmp_path):
    found = report(trace(tmp_path / "a.json", event(GEMM, 0, 10), event("mine", 3, 3, 8, **group_of())))
    assert [(row.kind, row.hidden_us) for row in found.rows] == [("model", 3)]


@pytest.mark.parametrize("form", ["nsys", "kineto"])
@pytest.mark.parametrize(
    ("name", "times"),  # µs of communication, and how much of it is hidden
    {
        "Memset": (10, 4),
        "Memcpy DtoD": (10, 4),
        "Memcpy HtoD": (10, 0),
        "Memcpy DtoH": (10, 0),
        "Memcpy PtoP": (14, 0),
    }.items(),
)
def test_what_copies_and_memsets_hide(tmp_path, form, name, times):
    """What writes on the device alone is compute, what crosses to another device is communication."""
    process = Process(7, work=[Work(NCCL, 1, 10, 20, 8), Work(name, 2, 16, 20), Work(name, 3, 20, 24)])
    write = write_nsys if form == "nsys" else write_kineto
    (total,) = report(write(tmp_path / "a", process if form == "kineto" else [process])).totals
    assert (total.communication_us, total.hidden_us) == times


def test_copies_between_host_and_device_are_no_exchange(tmp_path):
    spans, work = [Span("send-recv r0", 0, 5)], [Work("put", 1, 10, 20), Work("Memcpy HtoD", 2, 20, 30)]
    (row,) = report(write_nsys(tmp_path / "a", [Process(7, spans, work)])).rows
    assert (row.time_us, row.launches) == (10, 1)


def test_waits_are_of_one_process_group(tmp_path):
    files = [grouped(tmp_path, rank, [(10, 50 - 20 * rank)]) for rank in (0, 1)]
    files += [grouped(tmp_path, rank, [(10, 5)], "[2, 3]", "2") for rank in (2, 3)]
    assert waits(report(*files)) == [20, 0, 0, 0]
    assert waits(report(files[0], files[2])) == [None, None]


@pytest.mark.parametrize(
    "other",
    [
        {"collective": "broadcast"},
        {"world": 8},
        {"name": "9"},
        {"times": [(600, 40)]},
        {"times": [(10, 5)] * 2},
    ],
    ids=str,
)
def test_waits_are_not_made_up(tmp_path, other):
    files = [grouped(tmp_path, 0, [(10, 50)]), grouped(tmp_path, 1, **{"times": [(10, 40)], **other})]
    assert waits(report(*files)) == [None, None]


def test_waits_of_more_than_two_ranks_need_groups(tmp_path):
    processes = [
        Process(rank, [Span(f"trunk r{rank}", 0, 5)], [Work(NCCL, 1, 10, 20 + rank)], device=rank)
        for rank in range(4)
    ]
    assert waits(report(write_nsys(tmp_path / "a", processes))) == [None] * 4
    assert waits(report(write_nsys(tmp_path / "b", processes[:2]))) == [0, 1]


ALL = "[0, 1, 2, 3]"


def test_waits_need_all_ranks_of_the_group_once(tmp_path):
    files = [grouped(tmp_path, rank, [(10, 50 - rank)], ALL) for rank in range(4)]
    assert waits(report(*files)) == [3, 2, 1, 0]
    assert waits(report(*files[:3])) == [None] * 3
    twice = [event(NCCL, 10, 50, 8, device, **group_of()) for device in (0, 1)]
    files = [grouped(tmp_path, 1, [(10, 50)]), trace(tmp_path / "rank0.json", *twice, world=4)]
    assert waits(report(*files)) == [None] * 3


def exchanging(folder, rank):
    """A kernel of the exchange, with a group of four ranks."""
    events = [
        event(f"send-recv r{rank}", 0, 5, category="user_annotation"),
        event("launch", 1, 1, category="cuda_runtime", correlation=9),
        event(NCCL, 10, 50 - rank, 8, rank, correlation=9, **group_of(ALL, collective="all_to_all")),
    ]
    return trace(folder / f"rank{rank}.json", *events, rank=rank, world=4)


def test_neighbours_in_a_group_of_more_wait_for_each_other_alone(tmp_path):
    """An exchange, a send or a receive has other participants than the group has ranks."""
    files = [grouped(tmp_path, rank, [(10, 50 - rank)], ALL, collective="send") for rank in range(4)]
    assert waits(report(*files)) == [None] * 4
    assert waits(report(*(exchanging(tmp_path, rank) for rank in range(4)))) == [None] * 4


@pytest.mark.parametrize(
    ("step", "late", "expected"),
    [("step prefetch", 0, 0), ("step prefetch", 500, None), ("other", 0, None)],
)
def test_kernels_of_one_step_that_ran_apart_waited_for_nothing(tmp_path, step, late, expected):
    processes = []
    for rank, at in ((0, 0), (1, late)):
        spans = [Span(f"{step} r{rank}", at, at + 100), Span(f"send-recv r{rank}", at, at + 5)]
        work = [Work("put", at + 1, at + 10 + 30 * rank, at + 20 + 30 * rank)]
        processes.append(Process(rank, spans, work, device=rank))
    assert waits(report(write_nsys(tmp_path / "a", processes))) == [expected] * 2


def reducing(rank, *spans, name=NCCL):
    spans = spans or [Span(f"trunk r{rank}", 0, 5)]
    return Process(rank, spans, [Work(name, 1, 10, 20 + rank)], device=rank)


@pytest.mark.parametrize(
    "other",
    [
        reducing(1, Span("depth 1 r1", 0, 5)),
        reducing(1, Span("step sync r1", 0, 9), Span("trunk r1", 0, 5)),
        reducing(1, name="ncclDevKernel_Broadcast"),
    ],
    ids=["range", "step", "kernel"],
)
def test_without_groups_waits_are_of_one_kernel_in_one_range_and_step(tmp_path, other):
    assert waits(report(write_nsys(tmp_path / "a", [reducing(0), other]))) == [None, None]


def test_two_ranks_without_groups_must_be_each_others_only_peers(tmp_path):
    third = reducing(2, name="ncclDevKernel_Broadcast")
    assert waits(report(write_nsys(tmp_path / "a", [reducing(0), reducing(1), third]))) == [None] * 3
    for world, expected in ((2, 0), (4, None)):
        files = [
            trace(tmp_path / f"{rank}.json", event(NCCL, 5, 9, 8, rank), rank=rank, world=world)
            for rank in (0, 1)
        ]
        assert waits(report(*files)) == [expected] * 2


def test_times_on_different_clocks_tell_no_wait(tmp_path):
    files = [write_nsys(tmp_path / str(rank), [reducing(rank)]) for rank in (0, 1)]
    assert waits(report(*files)) == [None, None]


def test_two_ranks_in_one_file_are_refused(tmp_path):
    calls = [{**event("launch", 0, 1, category="cuda_runtime", correlation=1), "pid": pid} for pid in (5, 6)]
    one = [event(NCCL, 3, 3, 8, device, correlation=1) for device in (0, 1)]
    for events, reason in (([*calls, one[0]], "2 processes"), ([calls[0], *one], "one correlation number")):
        with pytest.raises(ProfileError, match=reason):
            read_profile(trace(tmp_path / "a.json", *events))


def test_kernels_of_one_graph_share_a_correlation_number(tmp_path):
    kernels = [
        event(GEMM, 3, 3, 7, device, correlation=1, **{"graph node id": 5 + device}) for device in (0, 1)
    ]
    assert [one.device for one in report(trace(tmp_path / "a.json", *kernels)).timelines] == [0, 1]


def test_events_of_unknown_devices_are_said(tmp_path):
    kernel, other = event(NCCL, 3, 3), event("k", 1, 2, category="mtia_ccp_events")
    python = event("f", 1, 2, category="python_function")
    said = "events of these categories are not known, and left out: mtia_ccp_events."
    assert said in " ".join(report(trace(tmp_path / "a.json", kernel, other, python)).notes)
    assert "categories" not in " ".join(report(trace(tmp_path / "b.json", kernel, python)).notes)
    with pytest.raises(ProfileError, match="not known: mtia_ccp_events"):
        read_profile(trace(tmp_path / "c.json", other))


RANGE = event("send-recv r0", 0, 5, category="user_annotation")


@pytest.mark.parametrize(
    "calls",
    [
        *("cuda_runtime", "cuda_driver", "hip_runtime", "xpu_runtime", "xpu_driver"),
        *("privateuse1_runtime", "privateuse1_driver", "runtime"),
    ],
)
def test_launches_of_every_kind_of_device_are_found(tmp_path, calls):
    """Of two calls with one number, as of a runtime and its driver, the first counts."""
    launches = [event("launch", at, 1, category=calls, correlation=9) for at in (7, 1, 8)]
    found = report(trace(tmp_path / "a.json", RANGE, *launches, event("put", 9, 3, correlation=9)))
    assert [(row.range, row.kind) for row in found.rows] == [("send-recv", "exchange")]


def test_all_times_count_from_the_base_of_the_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK", 1)  # the number spans several pieces
    base = 1661938466274408123
    launch = event("launch", 1, 1, category="cuda_runtime", correlation=9)
    path = trace(
        tmp_path / "a.json", RANGE, launch, event(NCCL, 2, 3, correlation=9), baseTimeNanoseconds=base
    )
    profile = read_profile(path)
    columns = (profile.activities, ("start", "end", "launched")), (profile.ranges, ("start", "end"))
    times = [int(getattr(table, name)[0]) - base for table, names in columns for name in names]
    assert times == [2000, 5000, 1000, 0, 5000]


def test_abbreviated_ranks_of_a_group_are_not_known(tmp_path):
    """torch shortens the list of a large group."""
    path = trace(tmp_path / "a.json", event(NCCL, 2, 3, **group_of("[0, 1, 2, ..., 63]")))
    assert read_profile(path).groups[0].ranks == ()


@pytest.mark.parametrize(
    ("name", "ends", "kind"),
    [
        ("Memcpy DtoD", (0, 1), Kind.PEER_COPY),
        ("Memcpy DtoD", (0, 0), Kind.LOCAL_COPY),
        ("Memcpy DtoD", (None, None), Kind.LOCAL_COPY),
        ("Memcpy AtoD", (0, 0), Kind.LOCAL_COPY),
        ("Memcpy DtoA", (0, 0), Kind.LOCAL_COPY),
        ("Memcpy HtoD", (None, 1), Kind.HOST_COPY),
    ],
)
def test_where_a_copy_goes(tmp_path, name, ends, kind):
    known = {side: end for side, end in zip(("fromDevice", "toDevice"), ends, strict=True) if end is not None}
    path = trace(tmp_path / "a.json", event(name, 1, 2, category="gpu_memcpy", **known))
    assert read_profile(path).activities.kind.tolist() == [kind]
    number = {"DtoD": 8, "HtoD": 1, "AtoD": 6, "DtoA": 7}[name.split()[1]]
    path = write_nsys(tmp_path / "a.sqlite", [Process(7, work=[Work("Memcpy DtoD", 1, 3, 6)])])
    with closing(sqlite3.connect(path)) as db:
        table = "CUPTI_ACTIVITY_KIND_MEMCPY"
        for column, end in zip(("srcDeviceId", "dstDeviceId"), ends, strict=True):
            db.execute(f"ALTER TABLE {table} ADD {column} DEFAULT {'NULL' if end is None else end}")
        db.execute(f"UPDATE {table} SET copyKind = {number}")
        db.commit()
    assert read_profile(path).activities.kind.tolist() == [kind]


def test_names_that_torch_counts_up_are_one_range(tmp_path):
    texts = ["ProfilerStep#1", "ProfilerStep#2", "aten::add, seq = 3, op_id = 7", "aten::add, op_id = 8"]
    events = []
    for number, text in enumerate(texts):
        at = 100 * number
        events += [
            event(text, at, 50, category="user_annotation"),
            event(NCCL, at + 9, 3, correlation=number),
        ]
        events.append(event("launch", at + 1, 1, category="cuda_runtime", correlation=number))
    found = report(trace(tmp_path / "a.json", *events))
    assert [(row.range, row.launches) for row in found.rows] == [("ProfilerStep", 2), ("aten::add", 2)]


def test_files_of_one_name_and_missing_ranks_are_told_apart(tmp_path):
    files = [trace(tmp_path / folder / "a.json", event(NCCL, 3, 3 + i)) for i, folder in enumerate("xy")]
    assert [one.label for one in report(*files).timelines] == ["x/a.json: rank 0", "y/a.json: rank 0"]
    assert "given twice" not in " ".join(report(*files).notes)
    twice = report(files[0], files[0])
    assert twice.sources == ("a.json (1)", "a.json (2)")
    assert "given twice" in " ".join(twice.notes)
    files = [grouped(tmp_path, rank, [(10, 50)]) for rank in (0, 1, 3)]
    assert "3 of 4 ranks are there" in " ".join(report(*files).notes)


def test_files_of_different_jobs_are_said(tmp_path):
    files = [grouped(tmp_path, rank, [(10, 50)], world=world) for rank, world in ((0, 2), (1, 4))]
    assert "The files are of different jobs: of 2 and 4 ranks." in report(*files).notes


def test_other_processes_on_a_device_are_said_and_hide_nothing(tmp_path):
    processes = [Process(5, work=[Work(NCCL, 1, 3, 6)]), Process(6, work=[Work(GEMM, 1, 2, 9)])]
    found = report(write_nsys(tmp_path / "a", processes))
    assert [total.hidden_us for total in found.totals] == [0, 0]
    assert "2 processes use device 0 (process 5 device 0, process 6 device 0)" in " ".join(found.notes)
    processes[1] = Process(6, work=[Work(GEMM, 1, 2, 9)], device=1)
    assert "processes use device" not in " ".join(report(write_nsys(tmp_path / "b", processes)).notes)


def test_absolute_times_keep_nanoseconds(tmp_path):
    start = "1661938466274408"
    text = json.dumps([event(GEMM, 1, 3), event(NCCL, 2, 4, 8)])
    for short, long in (("1", f"{start}.001"), ("2", f"{start}.002")):
        text = text.replace(f'"ts": {short},', f'"ts": {long},')
    (tmp_path / "a.json").write_text(text)
    (row,) = report(tmp_path / "a.json").rows
    assert (row.time_us, row.hidden_us) == (4, 2.999)


ODD = {"args": [None, [], 5], "name": [None, 5, [1]], "tid": [None], "dur": [None, -3]}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in ODD for value in ODD[field]])
def test_odd_values_are_read(tmp_path, field, value):
    odd = [{"name": "no phase"}, {**event("no time", 0, 1), "dur": 1}, {**RANGE, "cat": None}]
    del odd[1]["ts"]
    events = [*odd, event(GEMM, 1, 10, bytes=1 << 60), {**event(NCCL, 3, 3, 8), field: value}]
    found = report(trace(tmp_path / "a.json", *events))
    activities = found.timelines[0].profile.activities
    assert (activities.end >= activities.start).all()
    assert (activities.num_bytes == UNKNOWN).all()
    assert sum(total.communication_us for total in found.totals) == (0 if field in ("name", "dur") else 3)
    assert field != "dur" or "as no time" in " ".join(found.notes)


@pytest.mark.parametrize(
    "text",
    [
        '[{"ph":"X","cat":"kernel","name":"k","ts":' + "9" * 5000 + "}]",
        '[{"ph":"X","cat":"kernel","name":"k","ts":NaN}]',
        '[{"ph":"X","cat":"kernel","name":"k","ts":1e400}]',
        '[{"ph":"X","cat":"kernel","name":"k","ts":true}]',
        '{"traceEvents":[{"ph":"X","cat":"kernel","name":"k","ts":1}],"baseTimeNanoseconds":"soon"}',
        '[{"ph":"X","cat":"mtia_ccp_events","name":"k","ts":1,"dur":2}]',
        '{"schemaVersion":1,"distributedInfo":[1],"traceEvents":[]}',
        "[" * 100_000,
    ],
    ids=["digits", "nan", "infinite", "bool", "base", "mtia", "info", "deep"],
)
def test_what_cannot_be_read_is_an_error(tmp_path, text, monkeypatch, capsys):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ProfileError, match=r"^a.json: "):
        read_profile(tmp_path / "a.json")
    monkeypatch.setattr("sys.argv", ["shrink", str(tmp_path / "a.json"), str(tmp_path / "b")])
    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr().err
    assert said.startswith("error: a.json: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_blanks_and_control_characters(tmp_path, encoding, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK", 7)  # every value spans several pieces
    text = json.dumps([event(NCCL + "\t\x1b", 1.5, 3)]).replace("\\t", "\t")
    (tmp_path / "a.json").write_bytes((" " * 300 + text).encode(encoding))
    found = report(tmp_path / "a.json")
    assert found.rows[0].time_us == 3
    assert [*found.timelines[0].profile.names] == [NCCL + "\ufffd" * 2]


def test_text_that_goes_on_is_an_error(tmp_path, monkeypatch):
    path = trace(tmp_path / "a.json", event(NCCL, 1, 2), event("x" * 999, 3, 1))
    monkeypatch.setattr(json_stream, "CHUNK", 100)
    monkeypatch.setattr(json_stream, "LONGEST_VALUE", 500)
    with pytest.raises(ProfileError, match="one of its values is longer than 500 characters"):
        read_profile(path)
    path.write_text(json.dumps([event(NCCL, 1, 2)]) + "]")
    with pytest.raises(ProfileError, match="something follows its end"):
        read_profile(path)


def test_a_device_is_no_profile():
    with pytest.raises(ProfileError, match="not a file on a disk"):
        read_profile(Path("/dev/null"))


def test_a_gzip_may_expand_as_profiles_do(tmp_path, monkeypatch):
    """A small one by any factor, and a large one by a factor that profiles do not reach."""
    path, text = tmp_path / "a.json", json.dumps([event(NCCL, 1, 2)] * 99)
    for least, data in ((read.LEAST_LIMIT_BYTES, text + " " * (1 << 22)), (1, text)):
        monkeypatch.setattr(read, "LEAST_LIMIT_BYTES", least)
        path.write_bytes(gzip.compress(data.encode()))
        assert len(data) < 100 * path.stat().st_size or least > 1
        assert read_profile(path).activities.start.size == 99


def test_a_gzip_that_expands_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "LEAST_LIMIT_BYTES", 1 << 20)
    for name, head in (("a.json", b"["), ("b", b"SQLite format 3\0")):
        (tmp_path / name).write_bytes(gzip.compress(head + b" " * (1 << 22)))
        with pytest.raises(ProfileError, match="expands more than"):
            read_profile(tmp_path / name)


KERNELS = "CUPTI_ACTIVITY_KIND_KERNEL"


def export(path, change="", *more, **fields):
    """An export of two kernels, changed by SQL."""
    work = [Work(GEMM, 1, 2, 9), Work(NCCL, 1, 3, 6, 8), *more]
    write_nsys(path, [Process(7, work=work, **fields)])
    with closing(sqlite3.connect(path)) as db:
        db.executescript(change)
    return path


def test_a_database_that_yields_more_rows_than_it_has_room_for(tmp_path, monkeypatch):
    """As a crafted one does whose pages lead to one another."""
    path = export(tmp_path / "a.sqlite")
    assert read_profile(path).activities.start.size == 2
    monkeypatch.setattr(nsys, "LEAST_ROW_BYTES", path.stat().st_size)
    with pytest.raises(ProfileError, match="yields more rows than it has room for"):
        read_profile(path)


def test_more_devices_than_can_be_real(tmp_path, monkeypatch):
    path = export(tmp_path / "a.sqlite", f"UPDATE {KERNELS} SET deviceId = rowid")
    assert len(report(path).timelines) == 2
    monkeypatch.setattr(profile_columns, "MOST_DEVICES", 1)
    with pytest.raises(ProfileError, match="2 devices: at most 1 are read"):
        read_profile(path)


@pytest.mark.parametrize("column", ["start", "streamId", "demangledName"])
@pytest.mark.parametrize("value", ["'soon'", "1e300", "x'00ff'"])
def test_values_of_odd_types_are_an_error(tmp_path, column, value):
    path = export(tmp_path / "a.sqlite", f"UPDATE {KERNELS} SET {column} = {value}")
    with pytest.raises(ProfileError, match=r"a\.sqlite: the SQLite file is damaged"):
        read_profile(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (f"UPDATE {KERNELS} SET start = NULL", "2 activities have no start"),
        (f"UPDATE {KERNELS} SET start = {1 << 61}, end = {(1 << 61) + 1}", "a time lies more than"),
        (f"UPDATE {KERNELS} SET start = -{1 << 62}", "a time lies more than"),
    ],
)
def test_times_that_are_none_are_an_error(tmp_path, change, words):
    with pytest.raises(ProfileError, match=words):
        read_profile(export(tmp_path / "a.sqlite", change))


def test_activities_that_end_before_they_begin_count_as_no_time(tmp_path):
    found = report(export(tmp_path / "a.sqlite", f"UPDATE {KERNELS} SET end = start - 1"))
    activities = found.timelines[0].profile.activities
    assert (activities.end == activities.start).all()
    assert "2 activities end before they begin, or have no end, and count as no time" in " ".join(found.notes)


@pytest.mark.parametrize(("rank", "label"), [("9" * 9, "rank " + "9" * 9), ("9" * 10, "process 7 device 0")])
def test_a_rank_of_ten_digits_is_none(tmp_path, rank, label):
    path = export(tmp_path / "a.sqlite", spans=[Span(f"trunk r{rank}", 0, 5)])
    assert [one.label for one in report(path).timelines] == [label]


def test_names_that_are_no_text_are_read(tmp_path):
    """Bytes that are no UTF-8, in a text and as a blob."""
    for kind in ("TEXT", "BLOB"):
        path = export(tmp_path / kind, f"UPDATE StringIds SET value = CAST(x'6e63636cff' AS {kind})")
        assert set(read_profile(path).names) == {"nccl\ufffd"}


@pytest.mark.parametrize("known", ["demangledName", "shortName", "mangledName"])
def test_a_kernel_has_the_best_name_that_is_known(tmp_path, known):
    """The demangled one, else the short one, else the mangled one."""
    order = ["demangledName", "shortName", "mangledName"]
    change = f"ALTER TABLE {KERNELS} ADD mangledName;"
    for number, name in enumerate(order, 900):
        value = number if order.index(name) >= order.index(known) else "NULL"
        change += f"INSERT INTO StringIds VALUES ({number}, '{name}'); UPDATE {KERNELS} SET {name} = {value};"
    assert set(read_profile(export(tmp_path / "a.sqlite", change)).names) == {known}


def test_bytes_that_no_copy_has_are_not_believed(tmp_path):
    copies = [Work("Memcpy PtoP", 1, 3, 6, num_bytes=size) for size in (64, 1 << 60, -5)]
    path = export(tmp_path / "a.sqlite", "", *copies)
    assert read_profile(path).activities.num_bytes.tolist() == [UNKNOWN, UNKNOWN, 64, UNKNOWN, UNKNOWN]


def test_graph_nodes_that_are_copies_of_each_other(tmp_path):
    node = Work(NCCL, 1, 10, 20, graph_node=1)
    path = export(tmp_path / "a.sqlite", "", node, nodes=[(1, 2, 0.5), (2, 3, 0.6), (3, 1, 0.7)])
    assert report(path).totals[0].communication_us == 13


def test_virtual_tables_are_not_read(tmp_path):
    columns = "start, end, deviceId, streamId, correlationId"
    path = export(
        tmp_path / "a", f"DROP TABLE {KERNELS}; CREATE VIRTUAL TABLE {KERNELS} USING fts5({columns});"
    )
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"INSERT INTO {KERNELS} VALUES (1, 2, 0, 7, 1)")
        db.commit()
    with pytest.raises(ProfileError, match="was the GPU traced"):
        read_profile(path)


def test_views_are_not_read(tmp_path):
    path = write_nsys(tmp_path / "a.sqlite", [Process(7, work=[Work(NCCL, 1, 3, 6)])])
    with closing(sqlite3.connect(path)) as db:
        table = "CUPTI_ACTIVITY_KIND_KERNEL"
        db.executescript(f"ALTER TABLE {table} RENAME TO x; CREATE VIEW {table} AS SELECT * FROM x;")
    with pytest.raises(ProfileError, match="was the GPU traced"):
        read_profile(path)


def test_a_deep_nest_takes_no_quadratic_time():
    size = 100_000
    start = np.arange(size)
    nesting = Nesting(np.zeros(size, np.int64), start, 2 * size - start)
    times = np.full(size, 2 * size - 5)
    assert (nesting.innermost(np.zeros(size, np.int64), times) == 5).all()


def test_unions_of_groups_are_those_of_each():
    random = np.random.default_rng(0)
    group, start = random.integers(0, 5, 200), random.integers(0, 300, 200)
    end = start + random.integers(-2, 9, 200)
    of, begin, stop = merge_each(group, start, end)
    for one in range(5):
        union = merge(start[group == one], end[group == one])
        assert np.array_equal(np.stack(union), np.stack([begin[of == one], stop[of == one]]))
        assert sum_each(of, stop - begin, 5)[one] == length(union)
    assert covered((begin[:0], stop[:0]), begin, stop).sum() == 0


def test_many_range_names_take_no_longer_than_few(tmp_path):
    times = []
    for names in (8, 8000):
        spans = [Span(f"layer {i % names}", 10 * i, 10 * i + 5) for i in range(16_000)]
        work = [Work(NCCL, 10 * i + 1, 10 * i + 2, 10 * i + 4) for i in range(16_000)]
        profile = read_profile(write_nsys(tmp_path / str(names), [Process(7, spans, work)]))
        begin = process_time()
        assert len(report_on([profile]).rows) == names
        times.append(process_time() - begin)
    assert times[1] < 4 * times[0] + 0.5  # a pass over all kernels for each name takes several seconds
