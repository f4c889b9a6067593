"""Write the rolls of all tensors and depths from the tokens that are held and those received: one launch."""

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
    chunk_of,
    copy_metadata,
    document_of,
    held_chunk,
    local_len_of,
)
from overlap_mtp.kernels.launch import Grid, Launch


@triton.jit
def find_sources(metadata, plan_table, local_index, depth, C: tl.constexpr):
    """Where the token `depth` after each local token [BLOCK] is, [BLOCK] each:

    (its local_index or its received row, whether it is held here, whether it was received)
    """
    inside = local_index < local_len_of(metadata, C)
    sequence, start, chunk_len, held, offset = chunk_of(metadata, local_index, C)
    position = start + held_chunk(held, C) * chunk_len + offset
    _, valid_end = document_of(metadata, sequence, position, C)
    wanted = inside & (position + depth < valid_end)
    in_tail = inside & (valid_end < 0)  # stays as it is

    chunk_distance = (offset + depth) // chunk_len
    beyond = offset + depth - chunk_distance * chunk_len
    route = plan_table + C.routes_at + 2 * (held * (C.num_depths + 1) + chunk_distance)
    code = tl.load(route, mask=wanted, other=0)
    stride = tl.load(route + 1, mask=wanted, other=0)
    source = (
        tl.where(code < 0, start // C.cp_size + (-1 - code) * chunk_len, code + sequence * stride) + beyond
    )
    source = tl.where(in_tail, local_index, source)
    return source.to(tl.int64), in_tail | wanted & (code < 0), wanted & (code >= 0)


@triton.jit
def find_users_of_received(metadata, asked, count, row, inside, depth, C: tl.constexpr):
    """Which local tokens have received rows as their rolls at a depth: (the tokens, whether there are such).

    It is the inverse of `find_sources`. Rows and depths may be blocks that broadcast. `asked` is int32 [4, count], as
    `ExchangePlan.asked`; a negative sequence stands for a row without a token.
    """
    sequence = tl.load(asked + row, mask=inside, other=-1)
    held = tl.load(asked + count + row, mask=inside, other=0)
    chunk_distance = tl.load(asked + 2 * count + row, mask=inside, other=0)
    offset = tl.load(asked + 3 * count + row, mask=inside, other=0)
    known = inside & (sequence >= 0)
    start, end = bounds_of(metadata, sequence, known, C)
    chunk_len = (end - start) // C.num_chunks
    before = offset + chunk_distance * chunk_len - depth
    known = known & (end < NO_DOCUMENT_AT) & (offset < chunk_len) & (before >= 0) & (before < chunk_len)
    position = tl.where(known, start + held_chunk(held, C) * chunk_len + before, 0)
    _, valid_end = document_of(metadata, tl.where(known, sequence, 0), position, C)
    user = start // C.cp_size + held * chunk_len + before
    return user, known & (position + depth < valid_end)


@triton.jit
def store_rolls(
    metadata,
    plan_table,
    tensor_table,
    recv_buffer,
    block,
    depth,
    tensor_row,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the rolls of a block of local tokens, for one depth (from 0), and one tensor and batch row.

    `recv_buffer` is None if what peers send is written elsewhere.
    """
    local_index = block * BLOCK + tl.arange(0, BLOCK)
    source, is_held, is_received = find_sources(metadata, plan_table, local_index, depth + 1, C)
    n = tensor_row % C.num_tensors
    b = tensor_row // C.num_tensors
    width = tl.load(tensor_table + n)
    fill = tl.load(tensor_table + C.num_tensors + n)
    tensor = tl.load(metadata + C.metadata_len + n)
    output = tl.load(metadata + C.metadata_len + C.num_tensors * (1 + depth) + n)
    local_len = local_len_of(metadata, C).to(tl.int64)
    inside = local_index < local_len
    if recv_buffer is None:
        word = fill
        inside = inside & ~is_received
    else:
        word_at = source * (C.num_tensors * C.batch_rows) + n * C.batch_rows + b
        word = tl.where(is_received, tl.load(recv_buffer + word_at, mask=is_received, other=0), fill)
    NUM_WIDTHS: tl.constexpr = C.num_widths
    for w in tl.static_range(NUM_WIDTHS):
        if width == C.widths[w]:
            pointer = as_pointer(tensor, C.widths[w]) + b * local_len + source
            held = tl.load(pointer, mask=is_held, other=0)
            rolled = tl.where(is_held, held.to(tl.int64), word)
            to = as_pointer(output, C.widths[w]) + b * local_len + local_index
            tl.store(to, rolled.to(held.dtype), mask=inside & (output != 0))


@triton.jit
def check_headers(metadata, plan_table, recv_buffer, error_flags, C: tl.constexpr):
    """Set error_flags[0] to 1 + i if another plan made the message of the i-th source."""
    expected = tl.load(metadata + FINGERPRINT_AT)
    NUM_SOURCES: tl.constexpr = C.num_sources
    for i in tl.static_range(NUM_SOURCES):
        row = tl.load(plan_table + C.headers_at + i).to(tl.int64)
        received = tl.load(recv_buffer + row * (C.num_tensors * C.batch_rows))
        tl.store(error_flags, i + 1, mask=received != expected)


@triton.jit
def keep_for_replays(metadata, replay_metadata, C: tl.constexpr):
    """Let the replays of a graph find on the device what its capture found in the host's memory.

    Other programs may look at it meanwhile (`metadata_of`), so the fingerprint comes last.
    """
    if C.is_replayable:
        is_empty = tl.load(replay_metadata + FINGERPRINT_AT) < 0
        tl.debug_barrier()  # the copy overwrites what other warps have yet to read
        if is_empty:
            copy_metadata(metadata, replay_metadata, C, FINGERPRINT_AT + 1)
            tl.debug_barrier()
            fingerprint = tl.load(metadata + FINGERPRINT_AT)
            tl.atomic_xchg(replay_metadata + FINGERPRINT_AT, fingerprint, sem="release", scope="gpu")


@triton.jit
def unroll_kernel(
    metadata,  # int64 [addresses_end], on the device
    replay_metadata,
    plan_table,
    tensor_table,
    recv_buffer,  # [num_recv_rows, num_tensors * batch_rows]
    error_flags,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.program_id(2) < C.num_tensors * C.batch_rows:
        block, depth, tensor_row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        store_rolls(metadata, plan_table, tensor_table, recv_buffer, block, depth, tensor_row, C, BLOCK)
    elif tl.program_id(0) + tl.program_id(1) == 0:
        check_headers(metadata, plan_table, recv_buffer, error_flags, C)
        keep_for_replays(metadata, replay_metadata, C)


def unroll(buffers: tuple[torch.Tensor, ...], constants: ExchangeConstants, block: int = 256) -> Launch:
    """Bind the unroll kernel to its buffers. `overlap_mtp.kernels.reference.unroll` is the same in plain torch.

    Args:
        buffers: the first six arguments of `unroll_kernel`. `metadata` is what `pack` left. `error_flags` may be
            pinned host memory: the host then looks at it without waiting for the device.
        constants: of the exchange.
        block: local tokens of one program.

    Returns:
        The launch. Its grid depends on the batch: give it `unroll_grid`.
    """
    return Launch(unroll_kernel, buffers, (1, 1, 1), C=constants, BLOCK=block)


def unroll_grid(local_len: int, constants: ExchangeConstants, block: int = 256) -> Grid:
    """The grid for `local_len` tokens a rank: blocks of local tokens, depths, tensors of all batch rows and one more.

    In place of the one more, the first program does what is done once, and the others nothing.
    """
    tensor_rows = constants.num_tensors * constants.batch_rows
    return triton.cdiv(local_len, block), constants.num_depths, tensor_rows + 1
