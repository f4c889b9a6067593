"""Gather the tokens that peers need into one send buffer: all tensors, documents and depths in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from overlap_mtp.kernels.common import (
    FINGERPRINT_AT,
    NO_DOCUMENT_AT,
    ExchangeConstants,
    as_pointer,
    bounds_of,
    copy_metadata,
    local_len_of,
    metadata_of,
)
from overlap_mtp.kernels.launch import Launch


@triton.jit
def token_of_row(metadata, plan_table, row, inside, C: tl.constexpr):
    """(local_index of the token that a row carries, whether it carries one, whether it is a header), [BLOCK] each."""
    sequence = tl.load(plan_table + row, mask=inside, other=0)
    held = tl.load(plan_table + C.num_send_rows + row, mask=inside, other=0)
    offset = tl.load(plan_table + 2 * C.num_send_rows + row, mask=inside, other=0)
    used = inside & (sequence >= 0)
    start, end = bounds_of(metadata, sequence, used, C)
    chunk_len = (end - start) // C.num_chunks
    local_index = start // C.cp_size + held * chunk_len + offset
    return local_index, used & (end < NO_DOCUMENT_AT) & (offset < chunk_len), inside & (sequence < 0)


@triton.jit
def gather_rows(metadata, plan_table, tensor_table, row, inside, b, C: tl.constexpr):
    """What rows [BLOCK] carry of batch row `b`: int64 [padded_tensors, BLOCK]."""
    n = tl.arange(0, C.padded_tensors)
    known = n < C.num_tensors
    widths = tl.load(tensor_table + n, mask=known, other=0)
    addresses = tl.load(metadata + C.metadata_len + n, mask=known, other=0)
    local_index, used, header = token_of_row(metadata, plan_table, row, inside, C)
    token = b * local_len_of(metadata, C).to(tl.int64) + local_index
    fingerprint = tl.load(metadata + FINGERPRINT_AT)
    words = tl.where(header, fingerprint, 0)[None, :] + tl.zeros_like(addresses)[:, None]
    NUM_WIDTHS: tl.constexpr = C.num_widths
    for w in tl.static_range(NUM_WIDTHS):
        here = used[None, :] & (known & (widths == C.widths[w]))[:, None]
        pointer = as_pointer(addresses[:, None] + token[None, :] * C.widths[w], C.widths[w])
        words = tl.where(here, tl.load(pointer, mask=here, other=0).to(tl.int64), words)
    return words


@triton.jit
def store_rows(words, buffer, row, inside, b, C: tl.constexpr):
    """Write `words` [padded_tensors, BLOCK] of batch row `b` to rows of a buffer."""
    n = tl.arange(0, C.padded_tensors)
    to = row.to(tl.int64)[None, :] * (C.num_tensors * C.batch_rows) + n[:, None] * C.batch_rows + b
    tl.store(buffer + to, words, mask=inside[None, :] & (n < C.num_tensors)[:, None])


@triton.jit
def pack_kernel(
    host_metadata,  # int64 [addresses_end], may be pinned host memory
    replay_metadata,  # the same, on the device
    metadata,  # the same, written here
    plan_table,
    tensor_table,
    send_buffer,  # [num_send_rows, num_tensors * batch_rows]
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    source = metadata_of(host_metadata, replay_metadata, C)
    b = tl.program_id(1)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        if b == 0:
            copy_metadata(source, metadata, C)
    else:
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = row < C.num_send_rows
        words = gather_rows(source, plan_table, tensor_table, row, inside, b, C)
        store_rows(words, send_buffer, row, inside, b, C)


def pack(buffers: tuple[torch.Tensor, ...], constants: ExchangeConstants, block: int = 64) -> Launch:
    """Bind the pack kernel to its buffers. `overlap_mtp.kernels.reference.pack` is the same in plain torch.

    Args:
        buffers: the first six arguments of `pack_kernel`. `host_metadata` holds the metadata of the batch, the
            addresses of its tensors and those of its rolls; the kernel reads it when it runs. `replay_metadata`
            replaces it if the constants say so and its fingerprint is not negative: a captured graph gets other
            documents in this way. The kernel copies what it used to `metadata`, for the unroll. `plan_table` is
            ExchangePlan.table and `tensor_table` is ExchangeSpec.table.
        constants: of the exchange.
        block: rows of one program. One more program copies the metadata.

    Returns:
        The launch.
    """
    grid = (triton.cdiv(constants.num_send_rows, block) + 1, constants.batch_rows, 1)
    return Launch(pack_kernel, buffers, grid, C=constants, BLOCK=block)
