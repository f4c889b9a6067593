"""The kernels compile for a Hopper GPU, without one: what the interpreter accepts, the compiler may not."""

import os
import subprocess
import sys

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)
TENSORS = ("*i32", "*i64", "*u8", "*i16")


def compile_for_gpu(kernel, signature: dict[str, object], constants: dict[str, object]) -> int:
    """Bytes of machine code."""
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    by_position = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return len(triton.compile(ASTSource(kernel, signature, by_position), target=TARGET).asm["cubin"])


def compile_pack() -> int:
    from overlap_mtp.kernels.pack import pack_kernel

    signature = {"tensors": TENSORS, "table": "*i32", "wire": "*i64", "length": "i32", "batch": "i32"}
    constants = {"NUM_ROWS": 66, "NUM_TENSORS": 4, "FINGERPRINT_AT": 70, "HEADER_ROW": -2, "BLOCK": 128}
    return compile_for_gpu(pack_kernel, signature, constants)


def compile_unroll() -> int:
    from overlap_mtp.kernels.unroll import unroll_kernel

    signature = {"tensors": TENSORS, "outputs": TENSORS, "table": "*i32", "wire": "*i64"}
    signature |= {"mismatch": "*i32", "length": "i32", "batch": "i32"}
    constants = {"FILLS": (0, 0, 1, 0), "NUM_TENSORS": 4, "NUM_DEPTHS": 2, "MAX_RUNS": 64, "SEARCH_STEPS": 6}
    constants |= {"RUN_BEGIN_AT": 66, "RUN_END_AT": 130, "HALO_AT": 194, "HEADERS_AT": 322, "NUM_HEADERS": 2}
    constants |= {"FINGERPRINT_AT": 324, "NOWHERE_CODE": -1, "BLOCK": 256}
    return compile_for_gpu(unroll_kernel, signature, constants)


@pytest.mark.parametrize("kernel", ["pack", "unroll"])
def test_kernels_compile_for_a_gpu(kernel):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, kernel], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


if __name__ == "__main__":
    print({"pack": compile_pack, "unroll": compile_unroll}[sys.argv[1]]())
