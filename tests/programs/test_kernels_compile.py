"""The kernels compile for a Hopper GPU, without one: what the interpreter accepts, the compiler may not."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {"plan_table": "*i32", "error_flags": "*i32"}  # all others are of int64


def compiled_size(launch) -> int:
    """Bytes of machine code of what a launch would run."""
    kernel, constants = launch._kernel, launch._constants
    assert len(kernel.arg_names) <= 12
    names = [name for name in kernel.arg_names if name not in constants]
    signature: dict[str, object] = {name: POINTERS.get(name, "*i64") for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    by_position = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return len(triton.compile(ASTSource(kernel, signature, by_position), target=TARGET).asm["cubin"])


def launches(kind: str) -> list[object]:
    """Every kernel of an exchange, for a rank of three, all widths and several rows."""
    from overlap_mtp import SequenceLayout
    from overlap_mtp.exchange.plan import make_plans
    from overlap_mtp.exchange.symmetric import MemoryLayout
    from overlap_mtp.kernels.common import ExchangeConstants
    from overlap_mtp.kernels.pack import pack
    from overlap_mtp.kernels.put_pack import put_pack
    from overlap_mtp.kernels.unroll import unroll
    from overlap_mtp.kernels.wait_unroll import acknowledge, wait_unroll

    from simulated import spec_of
    from strategies import random_batch

    layout = SequenceLayout.packed([0, 24, 48], 3, kind)
    plans = make_plans(layout, 2, 100)
    spec = spec_of(random_batch(layout), layout, 2, 100)
    memory = MemoryLayout.of(plans, spec.words_per_token).constants
    constants = ExchangeConstants.of(spec, plans[1], is_replayable=True, memory=memory)
    word = torch.zeros(1, dtype=torch.int64)
    return [
        pack((word,) * 6, constants),
        unroll((word,) * 6, constants),
        put_pack((word,) * 10, constants),
        wait_unroll((word,) * 8, constants),
        acknowledge(word, word, constants),
    ]


def test_kernels_compile_for_a_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    sizes = [int(size) for size in done.stdout.split()]
    assert len(sizes) == 2 * 5
    assert min(sizes) > 0


if __name__ == "__main__":
    print(*(compiled_size(one) for kind in ("zigzag", "contiguous") for one in launches(kind)))
