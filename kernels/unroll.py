"""Writes the rolls of all tensors at all depths from what is held and what was received: one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from overlap_mtp.plan import NOWHERE, PlanShape


@triton.jit
def unroll_kernel(
    tensors,  # tuple of [B, L]
    outputs,  # tuple of [D * B, L]
    table,
    wire,  # [num_recv_rows, NUM_TENSORS * B]
    mismatch,  # [1]
    length,
    batch,
    FILLS: tl.constexpr,
    NUM_TENSORS: tl.constexpr,
    NUM_DEPTHS: tl.constexpr,
    MAX_RUNS: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    RUN_BEGIN_AT: tl.constexpr,
    RUN_END_AT: tl.constexpr,
    HALO_AT: tl.constexpr,
    HEADERS_AT: tl.constexpr,
    NUM_HEADERS: tl.constexpr,
    FINGERPRINT_AT: tl.constexpr,
    NOWHERE_CODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    depth = tl.program_id(1) + 1
    b = tl.program_id(2)
    inside = slot < length

    # The slot's run: the last one that begins at or before it.
    run = tl.zeros([BLOCK], tl.int32)
    for step in tl.static_range(SEARCH_STEPS):
        candidate = run + (1 << (SEARCH_STEPS - 1 - step))
        used = candidate < MAX_RUNS
        begin = tl.load(table + RUN_BEGIN_AT + candidate, mask=used, other=0)
        run = tl.where(used & (begin <= slot), candidate, run)

    ahead = slot + depth
    past = ahead - tl.load(table + RUN_END_AT + run)
    in_halo = inside & (past >= 0) & (past < NUM_DEPTHS)
    halo = tl.load(table + HALO_AT + run * NUM_DEPTHS + past, mask=in_halo, other=NOWHERE_CODE)
    source = tl.where(past < 0, ahead, halo)
    is_held = inside & (source >= 0) & (source < length)
    is_received = inside & (source >= length)

    row = (source - length).to(tl.int64) * (NUM_TENSORS * batch)
    out = ((depth - 1) * batch + b).to(tl.int64) * length + slot
    for n in tl.static_range(NUM_TENSORS):
        held = tl.load(tensors[n] + b.to(tl.int64) * length + source, mask=is_held, other=FILLS[n])
        word = tl.load(wire + row + n * batch + b, mask=is_received, other=0)
        tl.store(outputs[n] + out, tl.where(is_received, word.to(held.dtype), held), mask=inside)

    if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
        expected = tl.load(table + FINGERPRINT_AT).to(tl.int64)
        for h in tl.static_range(NUM_HEADERS):
            header = tl.load(table + HEADERS_AT + h).to(tl.int64)
            found = tl.load(wire + header * (NUM_TENSORS * batch))
            tl.store(mismatch, h + 1, mask=found != expected)


def unroll(
    tensors: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    fills: Sequence[int],
    table: torch.Tensor,
    shape: PlanShape,
    wire: torch.Tensor,
    mismatch: torch.Tensor,
    block: int = 256,
) -> None:
    """See `overlap_mtp.kernels.reference.unroll`; runs on the current stream. `block`: slots a program.

    `mismatch` may be pinned host memory, so that the host can look at it without waiting for the device.
    """
    batch, length = tensors[0].shape
    unroll_kernel[(triton.cdiv(length, block), shape.num_depths, batch)](
        tuple(tensors),
        tuple(outputs),
        table,
        wire,
        mismatch,
        length,
        batch,
        FILLS=tuple(fills),
        NUM_TENSORS=len(tensors),
        NUM_DEPTHS=shape.num_depths,
        MAX_RUNS=shape.max_runs,
        SEARCH_STEPS=(shape.max_runs - 1).bit_length(),
        RUN_BEGIN_AT=shape.run_begin_at,
        RUN_END_AT=shape.run_end_at,
        HALO_AT=shape.halo_at,
        HEADERS_AT=shape.headers_at,
        NUM_HEADERS=len(shape.sources),
        FINGERPRINT_AT=shape.fingerprint_at,
        NOWHERE_CODE=NOWHERE,
        BLOCK=block,
    )
