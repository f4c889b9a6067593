"""Tell from a kernel's name whether it communicates, computes, or leaves that open."""

from __future__ import annotations

import re
from enum import IntEnum

from overlap_mtp.profiling.trace import UNNAMED


class NameKind(IntEnum):
    COMPUTE = 0
    COMMUNICATION = 1
    SUSPECT = 2  # the name sounds like communication, but is of no library that is known here
    UNNAMED = 3
    EXPERTS = 4  # communication of a library that sends tokens to experts and back
    OWN = 5  # a kernel of this package


LIBRARIES = re.compile(
    r"nccl|rccl|nvshmem|rocshmem|mscclpp|msccl|oneccl|xccl|hccl"
    r"|multimem|(one|two)_shot_all_reduce|symmetric_memory::|nvshmem_extension"  # torch
    r"|cross_device_reduce|custom_?all_?reduce|vllm::(RankData|RankSignals|Signal)"  # vLLM and its descendants
    r"|quick_?reduce|user_?buffers|push_pull_halos"  # AITER, Transformer Engine, Apex
    r"|(trtllm|mnnvl|flashinfer)\w*(::)?\w*(all_?reduce|all_?to_?all|all_?gather|reduce_?scatter)"
    r"|(one|two)_?shot_?all_?reduce|allreduce_fusion|(?<![a-z])ar_fusion|lamport",
    re.IGNORECASE,
)
# A word ends here: no small letter follows, and in capitals no capital, unless it begins a word such as `Kernel`.
END = r"(?-i:(?![a-z]|(?<=[A-Z])[A-Z](?![a-z\d])))"
# deep_ep::layout only counts tokens; `hybrid_epilogue` and `moe_common` are other words.
EXPERTS = re.compile(
    rf"deep_?ep::(?!layout)|hybrid_?ep{END}|pplx|mooncake_?ep|uccl|mori::|moe_?(alltoall|a2a|comm(unicat|{END}))",
    re.IGNORECASE,
)
SOUNDS_LIKE_IT = re.compile(
    r"all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|send_?recv|a2a|(one|two)_?shot|multi_?cast|p2p|nvlink"
    r"|nvls|rdma|ibgda|int(ra|er)_?node|cross_(device|gpu|rank)|peer_(mem|copy|access|to)|symm_?mem"
    r"|(ring|halo|peer)_?exchange|(put|wait)_signal|signal_(pad|wait|put)"
    r"|(^|_|::)(send|recv|ipc|barrier|signals?)(_|$)|(^|::)put(_|$)|(^|::)broadcast(_kernel)?$"
    r"|(^|::)((cached_)?notify_)?(dispatch|combine)$",
    re.IGNORECASE,
)
INDUCTOR = re.compile(r"^triton_[a-z]{2,5}_fused_")  # torch.compile: compute, named after what was fused
OWN_KERNELS = (
    *("pack_kernel", "unroll_kernel", "put_unroll_kernel", "upload_kernel", "write_bounds_kernel"),
    *("put_words_kernel", "wait_words_kernel", "take_words_kernel"),
    *("row_maps_kernel", "pack_rows_kernel", "unroll_own_rows_kernel"),
    *("unroll_received_rows_kernel", "sum_rows_kernel", "pack_sums_kernel", "add_rows_kernel"),
)
CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
SIZE = re.compile(r"[1-9]\d{0,4}")
NESTED_NAME = re.compile(r"^_ZN?[A-Za-z]?(?=\d)")
LONGEST = 20_000  # characters of a name that are looked at


def kind_of_name(name: str) -> NameKind:
    """Judge a kernel's name, demangled or mangled.

    The libraries are searched for in the whole name, arguments included: a kernel that takes an `ncclDevComm`
    communicates. What merely sounds like communication counts only in the function's own name.
    """
    if name == UNNAMED:
        return NameKind.UNNAMED
    if INDUCTOR.match(name):
        return NameKind.COMPUTE
    name = _demangled(name[:LONGEST])
    if EXPERTS.search(name):
        return NameKind.EXPERTS
    if LIBRARIES.search(name):
        return NameKind.COMMUNICATION
    function = CAMEL.sub("_", _function(name))
    if SOUNDS_LIKE_IT.search(function):
        return NameKind.SUSPECT
    return NameKind.OWN if function in OWN_KERNELS else NameKind.COMPUTE


def _function(name: str) -> str:
    """The function's name with its namespaces: `a::f` of `void a::f<int>(b*)`."""
    kept, depth = [], 0
    for character in name.replace("(anonymous namespace)", "").replace("->", ""):
        depth += character in "<("
        if not depth:
            kept.append(character)
        depth -= character in ">)" and depth > 0
    words = "".join(kept).split()
    return words[-1] if words else ""


def _demangled(name: str) -> str:
    """`a::f` of `_ZN1a1fEv`: the identifiers of a mangled name; any other name as it is."""
    start = NESTED_NAME.match(name)
    if not start:
        return name
    words, at = [], start.end()
    while size := SIZE.match(name, at):
        at = size.end() + int(size[0])
        words.append(name[size.end() : at])
    return "::".join(words)
