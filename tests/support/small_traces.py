"""Traces of torch.profiler with a few events, made by hand, and what is reported of them."""

import json

from overlap_mtp.profiling import read_profile, report_on

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


def group_of(ranks="[0, 1]", name="1", collective="allreduce"):
    return {"Process Group Name": name, "Process Group Ranks": ranks, "Collective name": collective}


def grouped(folder, rank, times, *group, world=4, **more_of_group):
    more = group_of(*group, **more_of_group)
    kernels = [event(NCCL, ts, dur, 8, rank, **more) for ts, dur in times]
    return trace(folder / f"rank{rank}.json", event(GEMM, 0, 1000, 7, rank), *kernels, rank=rank, world=world)


RANGE = event("send-recv r0", 0, 5, category="user_annotation")
