"""Gathers the tokens that peers need into one outgoing wire, for all tensors, documents and depths: one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from overlap_mtp.plan import HEADER, PlanShape


@triton.jit
def pack_kernel(
    tensors,  # tuple of [B, L]
    table,
    wire,  # [num_rows, NUM_TENSORS * B]
    length,
    batch,
    NUM_ROWS: tl.constexpr,
    NUM_TENSORS: tl.constexpr,
    FINGERPRINT_AT: tl.constexpr,
    HEADER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < NUM_ROWS
    slot = tl.load(table + row, mask=inside, other=0)
    fingerprint = tl.load(table + FINGERPRINT_AT).to(tl.int64)
    b = tl.program_id(1)
    at = row.to(tl.int64) * (NUM_TENSORS * batch) + b
    for n in tl.static_range(NUM_TENSORS):
        token = tensors[n] + b.to(tl.int64) * length + slot
        word = tl.load(token, mask=inside & (slot >= 0), other=0).to(tl.int64)
        tl.store(wire + at + n * batch, tl.where(slot == HEADER_ROW, fingerprint, word), mask=inside)


def pack(
    tensors: Sequence[torch.Tensor],
    table: torch.Tensor,
    shape: PlanShape,
    wire: torch.Tensor,
    block: int = 128,
) -> None:
    """See `overlap_mtp.kernels.reference.pack`; runs on the current stream. `block`: rows a program."""
    batch, length = tensors[0].shape
    pack_kernel[(triton.cdiv(shape.num_send_rows, block), batch)](
        tuple(tensors),
        table,
        wire,
        length,
        batch,
        NUM_ROWS=shape.num_send_rows,
        NUM_TENSORS=len(tensors),
        FINGERPRINT_AT=shape.fingerprint_at,
        HEADER_ROW=HEADER,
        BLOCK=block,
    )
