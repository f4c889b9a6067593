"""Wait for the tokens of a source, and write them to the rolls of all depths: programs of `put_unroll`."""

from __future__ import annotations

import triton
import triton.language as tl

from overlap_mtp.kernels.common import FINGERPRINT_AT, as_pointer, local_len_of, rows_in_use
from overlap_mtp.kernels.signals import flag_of, give_up, wait_signal
from overlap_mtp.kernels.unroll import find_users_of_received

LATE_TOKENS = tl.constexpr(1)  # the word of `error_flags`


@triton.jit
def wait_for(metadata, buffer, rank, number, part, seq_no, memory, error_flags, timeout, C: tl.constexpr):
    """Wait until a source has signalled a part of exchange `seq_no`, and check its header. False if it is late."""
    flag = flag_of(memory + C.signals_at, seq_no, rank, part, C.num_parts, C)
    arrived = wait_signal(flag, seq_no, tl.load(timeout), C.on_gpu)
    if arrived:
        if part == 0:
            tl.store(error_flags, number + 1, mask=tl.load(buffer) != tl.load(metadata + FINGERPRINT_AT))
    else:
        give_up(error_flags + LATE_TOKENS, 1 + rank, timeout)
    return arrived


@triton.jit
def wait_unroll(
    metadata,
    plan_table,
    tensor_table,
    source,
    number,
    part,
    seq_no,
    memory,
    error_flags,
    timeout,
    C: tl.constexpr,
):
    """Write a part of what the source with this number puts to the rolls, or the fill if it is late."""
    first = tl.load(source + 2).to(tl.int32)
    begin = part * C.part_rows
    rows = rows_in_use(metadata, tl.load(source + 3), C)
    if (begin < rows) | (part == 0):
        row = begin + tl.arange(0, C.part_rows)
        depth = tl.arange(0, C.padded_depths)
        n = tl.arange(0, C.padded_tensors)
        is_tensor = n < C.num_tensors
        # Where they go is found before the wait.
        inside = (row < rows)[:, None] & (depth < C.num_depths)[None, :]
        asked = plan_table + (C.headers_at + C.num_sources)
        user, is_used = find_users_of_received(
            metadata, asked, C.num_recv_rows, first + 1 + row[:, None], inside, 1 + depth[None, :], C
        )
        widths = tl.load(tensor_table + n, mask=is_tensor, other=0)
        fills = tl.load(tensor_table + C.num_tensors + n, mask=is_tensor, other=0)
        outputs = tl.load(
            metadata + C.metadata_len + C.num_tensors * (1 + depth)[None, :] + n[:, None],
            mask=is_tensor[:, None] & (depth < C.num_depths)[None, :],
            other=0,
        )
        local_len = local_len_of(metadata, C).to(tl.int64)
        buffer = memory + seq_no % C.num_buffers * C.buffer_words + first * (C.num_tensors * C.batch_rows)
        rank = tl.load(source + 1)
        arrived = wait_for(metadata, buffer, rank, number, part, seq_no, memory, error_flags, timeout, C)
        for b in range(C.batch_rows):
            word_at = (1 + row)[None, :] * (C.num_tensors * C.batch_rows) + (n * C.batch_rows + b)[:, None]
            is_there = is_tensor[:, None] & (row < rows)[None, :] & arrived
            words = tl.where(is_there, tl.load(buffer + word_at, mask=is_there, other=0), fills[:, None])
            token = b * local_len + user
            NUM_WIDTHS: tl.constexpr = C.num_widths
            for w in tl.static_range(NUM_WIDTHS):
                is_here = (
                    is_used[None, :, :] & ((widths == C.widths[w])[:, None] & (outputs != 0))[:, None, :]
                )
                to = as_pointer(outputs[:, None, :] + token[None, :, :] * C.widths[w], C.widths[w])
                tl.store(to, words[:, :, None].to(to.dtype.element_ty), mask=is_here)
