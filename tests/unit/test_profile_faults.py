"""What a profile does not tell is said, and never made up."""

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from overlap_mtp.profiling import ProfileError, json_stream, read_profile
from overlap_mtp.profiling.names import OWN_KERNELS, NameKind, kind_of_name
from overlap_mtp.profiling.trace import Kind

from handmade import Process, Span, Work, write_kineto, write_nsys
from small_traces import GEMM, NCCL, RANGE, event, group_of, grouped, report, trace

ROOT = Path(__file__).parents[2]


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
        mnnvl::all_to_all allreduce_fusion_kernel ar_fusion_kernel trtllm_ar_fusion lamport_kernel user_buffers_sum""",
    NameKind.EXPERTS: """deepep::dispatch hybrid_ep::combine pplx_a2a mooncake_ep_dispatch uccl::dispatch
        mori::EpDispatch moe_a2a_kernel moeAlltoAllKernel moe_comm_kernel MoeCommKernel moeCommunicate HybridEPKernel
        hybridEpDispatch moe_commKernel moeCommKernel MOE_COMM MOE_COMM_KERNEL MoECOMMKernel MOE_COMMUNICATE
        moe_comm2 HYBRID_EP HYBRID_EP_COMBINE HybridEP HybridEPA2A hybrid_epKernel""",
    NameKind.SUSPECT: """ring_all_reduce reduce_scatter_2d all_to_all_v sendrecv_kernel a2a_kernel twoShot multicast
        p2p_copy nvlink_copy nvls_sum rdma_read ibgda_poll inter_node_sum intranode_sum cross_gpu_sum peer_copy
        symm_mem_copy halo_exchange put_signal signal_pad x_recv ipc_open barrier put_it broadcast
        x::broadcast_kernel cached_notify_combine SendKernel dispatch<decltype(a->b)>(int)""",
    NameKind.COMPUTE: """broadcast_add_kernel sender_kernel output_kernel combine_heads input_dispatch_table
        fused_linear_fusion_kernel scalar_fusion planar_fusion hybrid_epilogue HybridEpilogueKernel moe_common
        moe_commit MoeCommonKernel MOE_COMMON MOE_COMMON_KERNEL MOECOMMON MOE_COMMIT MOE_COMMS HYBRID_EPILOGUE
        HYBRID_EPILOGUE_KERNEL hybridEpilogue""",
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in EACH for name in EACH[kind].split()])
def test_each_library_and_each_suspicious_word_is_known(kind, name):
    assert kind_of_name(name) == kind


def test_the_kernels_of_this_package_are_known_by_name_and_hide_nothing(tmp_path):
    """They are in no range if their graph was captured before the profile began."""
    sources = [path.read_text() for path in (ROOT / "kernels").glob("*.py")]
    defined = {
        name for text in sources for name in re.findall(r"^@triton\.jit.*\ndef (\w+_kernel)\(", text, re.M)
    }
    launched = {name for text in sources for name in re.findall(r"\bLaunch\((\w+_kernel),", text)}
    assert launched < defined == set(OWN_KERNELS)
    assert {kind_of_name(name) for name in OWN_KERNELS} == {NameKind.OWN, NameKind.SUSPECT}
    for name in OWN_KERNELS:
        kernel = event(name, 0, 10, **{"graph node id": 5})
        found = report(trace(tmp_path / "a.json", kernel, event(NCCL, 3, 3, 8)))
        assert [row.hidden_us for row in found.rows if row.kind == "model"] == [0]
    assert kind_of_name("unrolled_elementwise_kernel") == NameKind.COMPUTE


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


def test_events_that_nsight_systems_lost_are_said(tmp_path):
    lost = [
        "Not all NVTX events might have been collected.",
        "12 CUDA events were dropped",
        "An event was lost",
    ]
    other = [
        "Number of CUDA events collected: 1,234.",
        "All events were captured.",
        "a" * 999 + " events were lost",
    ]
    work = [Process(7, work=[Work(NCCL, 1, 3, 6)])]
    found = report(write_nsys(tmp_path / "a", work, said=[*lost, *other, *lost]))
    said = [note for note in found.notes if "Nsight" in note]
    assert said == [f"a: Nsight Systems says that events are missing: {text}" for text in sorted(lost)]
    assert "Nsight" not in " ".join(report(write_nsys(tmp_path / "b", work, said=other)).notes)
    many = [f"{number} events were lost" for number in range(9)]
    assert "\n".join(report(write_nsys(tmp_path / "c", work, said=many)).notes).count("Nsight") == 5


def test_what_nsight_systems_says_in_other_columns_is_not_read(tmp_path):
    path = write_nsys(tmp_path / "a", [Process(7, work=[Work(NCCL, 1, 3, 6)])], said=["1 event was lost"])
    with closing(sqlite3.connect(path)) as db:
        db.execute("ALTER TABLE DIAGNOSTIC_EVENT RENAME text TO message")
    assert "Nsight" not in " ".join(report(path).notes)


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
