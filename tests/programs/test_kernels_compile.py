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
POINTERS = {"plan_table": "*i32", "error_flags": "*i32"}  # all others are of int64
# Of the kernels of activations. All others are of int32.
ROWS = dict.fromkeys(("tensor", "rows", "sums"), "*bf16") | dict.fromkeys(("length", "count", "uses"), "i32")
ROWS |= {"fingerprint": "i64", "metadata": "*i64"} | dict.fromkeys(("rolls", "gradients"), ("*bf16", "*bf16"))


def compiled(
    kernel, types: dict[str, object], others: str, constants: dict[str, object]
) -> dict[str, object]:
    """What a kernel becomes, by stage. Tensors of activations begin at multiples of 16 bytes."""
    names = kernel.arg_names
    assert len(names) <= 12
    options = {name: value for name, value in constants.items() if name not in names}
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: types.get(name, others) for name in names} | dict.fromkeys(constants, "constexpr")
    by_position = {(names.index(name),): value for name, value in constants.items()}
    aligned = {}
    for at, one in enumerate(signature.values()):
        paths = [(at, n) for n in range(len(one))] if isinstance(one, tuple) else [(at,)]
        aligned |= {path: [["tt.divisibility", 16]] for path in paths if "*bf16" in one}
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
    from overlap_mtp.kernels.put_unroll import put_unroll, upload
    from overlap_mtp.kernels.unroll import unroll

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
        upload(word, word, constants),
        put_unroll((word,) * 9, constants, layout.local_len),
    ]


def row_kernels() -> list[dict[str, object]]:
    """What the kernels of activations become, for two depths and rows of 4096 elements in bfloat16."""
    from overlap_mtp.kernels import rows

    constants = {
        "C": rows.RowConstants.of((1, 4096), 2, column=0, elements=4096, num_depths=2, num_headers=2)
    }
    kernels = [rows.pack_rows_kernel, rows.unroll_own_rows_kernel, rows.unroll_received_rows_kernel]
    kernels += [rows.sum_rows_kernel, rows.pack_sums_kernel, rows.add_rows_kernel]
    return [compiled(one, ROWS, "*i32", constants) for one in kernels]


def row_maps(kind: str, tp: tuple[int, int]) -> dict[str, object]:
    """What the kernel of the maps of activations becomes."""
    from overlap_mtp import SequenceLayout
    from overlap_mtp.exchange.rows import make_row_plans
    from overlap_mtp.kernels.row_maps import RowMapper, row_maps_kernel

    plan = make_row_plans(SequenceLayout.packed([0, 24, 48], 3, kind), 2, 100, True, tp)[1]
    constants = {"C": RowMapper.of(plan, torch.device("cpu")).constants, "BLOCK": 128}
    return compiled(row_maps_kernel, ROWS, "*i32", constants)


def test_kernels_compile_for_a_gpu():
    sizes = list(map(int, run_compiling(__file__, "tokens")))
    assert len(sizes) == 2 * 4
    assert min(sizes) > 0


def test_kernels_of_activations_compile_and_move_16_bytes_at_a_time():
    found = run_compiling(__file__, "activations")
    assert found == ["ld.global.v4.b32", "st.global.v4.b32"] * 6 + ["compiled"] * 3


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
