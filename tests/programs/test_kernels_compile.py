"""The kernels compile for a Hopper GPU, without one: what the interpreter accepts, the compiler may not."""

from __future__ import annotations

import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from not_interpreted import run_compiling

TARGET = GPUTarget("cuda", 90, 32)
# All other pointers are of int64.
POINTERS = {"plan_table": "*i32", "error_flags": "*i32"}
# Of the kernels of activations, those in bfloat16 and of int64. All others are of int32.
ROWS = {"rows": "*bf16"} | dict.fromkeys(
    ("words", "fingerprint", "metadata", "sent", "received", "peers", "memory", "seq_nos", "timeout"), "*i64"
)
ROWS |= dict.fromkeys(("count", "uses"), "i32")
ALIGNED = ("rows", "sent", "received", "memory")


def compiled(
    kernel, types: dict[str, object], others: str, constants: dict[str, object]
) -> dict[str, object]:
    """What a kernel becomes, by stage. Buffers of activations begin at multiples of 16 bytes."""
    names = kernel.arg_names
    assert len(names) <= 12
    options = {name: value for name, value in constants.items() if name not in names}
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: types.get(name, others) for name in names} | dict.fromkeys(constants, "constexpr")
    by_position = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED if name in names}
    source = ASTSource(kernel, signature, by_position, aligned)
    return triton.compile(source, target=TARGET, options=options).asm


def compiled_size(launch) -> int:
    """Bytes of machine code of what a launch would run."""
    return len(compiled(launch._kernel, POINTERS, "*i64", launch._constants)["cubin"])


def launches(kind: str) -> list[object]:
    """Every kernel of an exchange, for a rank of three, all widths and several rows."""
    from overlap_mtp import SequenceLayout
    from overlap_mtp.exchange.plan import make_plans
    from overlap_mtp.exchange.symmetric import MemoryLayout
    from overlap_mtp.kernels.common import ExchangeConstants
    from overlap_mtp.kernels.pack import pack
    from overlap_mtp.kernels.put_unroll import put_unroll
    from overlap_mtp.kernels.unroll import unroll
    from overlap_mtp.kernels.upload import upload

    from simulated import spec_of
    from strategies import random_batch

    layout = SequenceLayout.packed([0, 24, 48], 3, kind)
    plans = make_plans(layout, 2, 100)
    spec = spec_of(random_batch(layout), layout, 2, 100)
    memory = MemoryLayout.of(plans, spec).constants
    constants = ExchangeConstants.of(spec, plans[1], is_replayable=True, memory=memory)
    word = torch.zeros(1, dtype=torch.int64)
    return [
        pack((word,) * 6, constants),
        unroll((word,) * 6, constants),
        upload(word, word),
        put_unroll((word,) * 9, constants, layout.local_len),
    ]


def row_kernels() -> list[dict[str, object]]:
    """What the kernels of activations become, for two depths and rows of 4096 elements in bfloat16."""
    from overlap_mtp import SequenceLayout
    from overlap_mtp.exchange.row_spec import RowSpec
    from overlap_mtp.kernels.all_to_all import AllToAllConstants, put_words, take_words
    from overlap_mtp.kernels.rows import BoundRows, RowConstants

    layout = SequenceLayout.packed([0, 24, 48], 3)
    asked = ("overlap", "auto", 2, 100, layout.kind, True, 0)
    shapes = (torch.Size([1, 4096]),)
    spec = RowSpec(*asked, ("hidden",), torch.bfloat16, shapes, 1, 1, torch.device("cpu"))
    index, table, rows = torch.zeros(2, 8), torch.zeros(2, 2), torch.zeros(8, 4096)
    bound = BoundRows(RowConstants.of(spec), torch.zeros(1), torch.zeros(1), layout.local_len)
    launches = [bound.pack_rows(index[0], rows), bound.unroll_own_rows(index)]
    launches += [bound.unroll_received_rows(index, rows, table, table), bound.sum_rows(index)]
    launches += [bound.pack_sums(index, rows), bound.add_rows(index[0], index, rows, table, table)]
    words = torch.zeros(1)
    exchange = (words,) * 7, AllToAllConstants.of(3, 1, 2, 2, (4, 4096, 16384, 20000, 2048, 8))
    take = take_words(*exchange)
    launches += [put_words(*exchange), take]
    assert take.first is not None
    assert compiled(take.first._kernel, ROWS, "*i32", take.first._constants)["cubin"]  # it moves nothing
    return [compiled(one._kernel, ROWS, "*i32", one._constants) for one in launches]


def row_maps(kind: str, tp: tuple[int, int]) -> dict[str, object]:
    """What the kernel of the maps of activations becomes."""
    from overlap_mtp import SequenceLayout
    from overlap_mtp.exchange.rows import make_row_plans
    from overlap_mtp.kernels.row_maps import RowMapper

    plan = make_row_plans(SequenceLayout.packed([0, 24, 48], 3, kind), 2, 100, True, tp)[1]
    mapper = RowMapper.of(plan, torch.device("cpu"))
    launch = mapper.bind(torch.zeros(1), mapper.allocate(8))
    return compiled(launch._kernel, ROWS, "*i32", launch._constants)


def test_kernels_compile_for_a_gpu():
    sizes = list(map(int, run_compiling(__file__, "tokens")))
    assert len(sizes) == 2 * 4
    assert min(sizes) > 0


def test_kernels_of_activations_compile_and_move_16_bytes_at_a_time():
    found = run_compiling(__file__, "activations")
    rows, words = ["ld.global.v4.b32", "st.global.v4.b32"], ["ld.global.v2.b64", "st.global.v2.b64"]
    assert found == rows * 6 + words * 2 + ["compiled"] * 3


def print_all(what: str) -> None:
    if what == "tokens":
        print(*(compiled_size(one) for kind in ("zigzag", "contiguous") for one in launches(kind)))
        return
    for asm in row_kernels():
        for access in ("ld", "st"):
            # Of bfloat16 there is no other access. Maps, headers and flags are of 4 or 8 bytes.
            print(*sorted(set(re.findall(rf"\b({access}\.global\S*(?:v\d|b16)\S*)", asm["ptx"]))))
    for kind, tp in (("zigzag", (0, 1)), ("zigzag", (1, 2)), ("contiguous", (1, 2))):
        print("compiled" if row_maps(kind, tp)["cubin"] else "empty")


if __name__ == "__main__":
    print_all(sys.argv[1])
