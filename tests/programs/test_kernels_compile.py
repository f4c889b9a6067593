"""The kernels compile for a Hopper GPU, without one: what the interpreter accepts, the compiler may not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {"table": "*i32", "trouble": "*i32"}  # all others are of int64
LAYOUTS = ("zigzag", "contiguous")


def compiled_size(launch) -> int:
    """Bytes of machine code of what a launch would run."""
    kernel, constants = launch._kernel, launch._constants
    names = [name for name in kernel.arg_names if name not in constants]
    signature: dict[str, object] = {name: POINTERS.get(name, "*i64") for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    by_position = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return len(triton.compile(ASTSource(kernel, signature, by_position), target=TARGET).asm["cubin"])


def launches(kind: str) -> list[object]:
    """Every kernel of an exchange, for a rank of three, all widths and several rows."""
    from overlap_mtp import SequenceLayout
    from overlap_mtp.exchange.select import shapes_of
    from overlap_mtp.exchange.spec import Cargo
    from overlap_mtp.exchange.symmetric import SymmetricLayout
    from overlap_mtp.kernels.pack import pack
    from overlap_mtp.kernels.put_pack import put
    from overlap_mtp.kernels.unroll import unroll
    from overlap_mtp.kernels.wait_unroll import discard, take

    layout = SequenceLayout.packed([0, 24, 48], 3, kind)
    shapes = shapes_of(layout, 2, 100)
    dtypes = (torch.int64, torch.int32, torch.bfloat16, torch.bool)
    cargo = Cargo(("a", "b", "c", "padding_mask"), dtypes, torch.Size([2]), torch.device("cpu"))
    places = SymmetricLayout.of(shapes, cargo.words)
    constants = places.constants(timed=True)
    word = torch.zeros(1, dtype=torch.int64)
    shape = shapes[1]
    return [
        pack((word,) * 6, shape, cargo, overridable=True),
        unroll((word,) * 6, shape, cargo, overridable=True),
        put((word,) * 10, shape, cargo, constants, overridable=True),
        take((word,) * 8, shape, cargo, constants, overridable=True),
        discard(word, word, shape, 4, places.acknowledgements_at),
    ]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_kernels_compile_for_a_gpu(kind):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, kind], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    sizes = [int(size) for size in done.stdout.split()]
    assert len(sizes) == 5
    assert min(sizes) > 0


if __name__ == "__main__":
    print(*(compiled_size(one) for one in launches(sys.argv[1])))
