"""Wait for what the peers have put, unroll it, and tell them that their buffers are free: one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from overlap_mtp.kernels.common import ExchangeConstants, as_pointer
from overlap_mtp.kernels.launch import Launch
from overlap_mtp.kernels.put_pack import DONE_AT, SEQ_NO_AT
from overlap_mtp.kernels.signals import flag_of, signal, wait_signal
from overlap_mtp.kernels.unroll import check_headers, find_sources, keep_for_replays, store_rolls

LATE_TOKENS = tl.constexpr(1)  # the word of `error_flags` for them
SOURCE_WORDS = tl.constexpr(2)  # of `sources`: address of its memory, its cp rank


@triton.jit
def acknowledge_all(sources, seq_no, C: tl.constexpr):
    """Tell all sources that what they put for exchange `seq_no` has been read."""
    NUM_SOURCES: tl.constexpr = C.num_sources
    for s in tl.static_range(NUM_SOURCES):
        theirs = as_pointer(tl.load(sources + s * SOURCE_WORDS), 8)
        signal(flag_of(theirs + C.acknowledgements_at, seq_no, C.cp_rank, C), seq_no)


@triton.jit
def wait_unroll_kernel(
    metadata,  # int64 [addresses_end], as `put_pack` left it
    replay_metadata,
    plan_table,
    tensor_table,
    sources,  # int64 [num_sources, SOURCE_WORDS]
    memory,  # this rank's symmetric memory
    error_flags,
    timeout,  # int64 [1], 0 after something has failed
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    local_index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    depth = tl.program_id(1) + 1
    source, is_held, is_received = find_sources(metadata, plan_table, local_index, depth, C)
    seq_no = tl.load(metadata + SEQ_NO_AT)
    recv_buffer = memory + seq_no % C.num_buffers * C.buffer_words
    arrived = seq_no > 0
    NUM_SOURCES: tl.constexpr = C.num_sources
    for s in tl.static_range(NUM_SOURCES):
        rank = tl.load(sources + s * SOURCE_WORDS + 1)
        if not wait_signal(
            flag_of(memory + C.signals_at, seq_no, rank, C), seq_no, tl.load(timeout), C.is_timed
        ):
            arrived = seq_no < 0
            tl.store(error_flags + LATE_TOKENS, (1 + rank).to(tl.int32))
            tl.store(timeout, tl.zeros_like(seq_no))
    store_rolls(metadata, tensor_table, recv_buffer, source, is_held, is_received & arrived, C, BLOCK)
    if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
        keep_for_replays(metadata, replay_metadata, C)
        if arrived:
            check_headers(metadata, plan_table, recv_buffer, error_flags, C)
    tl.debug_barrier()
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    if tl.atomic_add(metadata + DONE_AT, 1, sem="acq_rel", scope="gpu") == programs - 1:
        acknowledge_all(sources, seq_no, C)


@triton.jit
def acknowledge_kernel(metadata, sources, C: tl.constexpr):
    acknowledge_all(sources, tl.load(metadata + SEQ_NO_AT), C)


def wait_unroll(buffers: tuple[torch.Tensor, ...], constants: ExchangeConstants, block: int = 256) -> Launch:
    """Bind the wait_unroll kernel to its buffers. `reference.wait_unroll` is the same in plain torch.

    If tokens do not come in time, `error_flags` says who is late and the rolls hold the fill.

    Args:
        buffers: the first eight arguments of `wait_unroll_kernel`.
        constants: of the exchange.
        block: local tokens of one program.

    Returns:
        The launch. Its grid depends on the batch: give it `overlap_mtp.kernels.unroll.unroll_grid`.
    """
    return Launch(wait_unroll_kernel, buffers, (1, 1, 1), C=constants, BLOCK=block)


def acknowledge(metadata: torch.Tensor, sources: torch.Tensor, constants: ExchangeConstants) -> Launch:
    """Bind the kernel that acknowledges an exchange which nobody will unroll.

    Args:
        metadata: as `put_pack` left it.
        sources: as for `wait_unroll`.
        constants: of the exchange.

    Returns:
        The launch.
    """
    return Launch(acknowledge_kernel, (metadata, sources), (1, 1, 1), C=constants)
