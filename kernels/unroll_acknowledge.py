"""Unroll what the peers have put, for which `put_pack` has waited: one launch.

It acknowledges the exchange that was unrolled before it. Each of these launches begins after the one before has ended,
so that one has been read, and nothing has to be counted or waited for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from overlap_mtp.kernels.common import ExchangeConstants, as_pointer
from overlap_mtp.kernels.launch import Launch
from overlap_mtp.kernels.put_pack import SEQ_NO_AT, SOURCE_WORDS
from overlap_mtp.kernels.signals import flag_of, signal
from overlap_mtp.kernels.unroll import check_headers, keep_for_replays, store_rolls


@triton.jit
def acknowledge_all(sources, seq_no, C: tl.constexpr):
    """Tell all sources that what they put for exchange `seq_no` has been read; 0: for none."""
    s = tl.arange(0, C.padded_sources)
    known = (s < C.num_sources) & (seq_no > 0)
    theirs = as_pointer(tl.load(sources + s * SOURCE_WORDS, mask=known, other=0), 8)
    signal(flag_of(theirs + C.acknowledgements_at, seq_no, C.cp_rank, C), seq_no, known)


@triton.jit
def unroll_acknowledge_kernel(
    metadata,  # int64 [addresses_end], as `put_pack` left it
    replay_metadata,
    plan_table,
    tensor_table,
    sources,  # int64 [num_sources, SOURCE_WORDS]
    memory,  # this rank's symmetric memory
    unrolled,  # int64 [1]: the exchange that was unrolled last and is not acknowledged, 0 for none
    error_flags,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    signed = tl.load(metadata + SEQ_NO_AT)
    arrived, seq_no = signed > 0, tl.abs(signed)
    recv_buffer = memory + seq_no % C.num_buffers * C.buffer_words
    if tl.program_id(2) < C.num_tensors * C.batch_rows:
        store_rolls(metadata, plan_table, tensor_table, recv_buffer, arrived, C, BLOCK)
    elif tl.program_id(0) + tl.program_id(1) == 0:
        acknowledge_all(sources, tl.atomic_xchg(unrolled, seq_no, sem="relaxed"), C)
        keep_for_replays(metadata, replay_metadata, C)
        if arrived:
            check_headers(metadata, plan_table, recv_buffer, error_flags, C)


@triton.jit
def acknowledge_kernel(metadata, sources, unrolled, C: tl.constexpr):
    acknowledge_all(sources, tl.abs(tl.load(metadata + SEQ_NO_AT)), C)
    acknowledge_all(sources, tl.atomic_xchg(unrolled, tl.zeros((), tl.int64), sem="relaxed"), C)


def unroll_acknowledge(
    buffers: tuple[torch.Tensor, ...], constants: ExchangeConstants, block: int = 256
) -> Launch:
    """Bind the unroll_acknowledge kernel to its buffers. `reference.unroll_acknowledge` is the same in plain torch.

    If tokens did not come in time, the rolls hold the fill.

    Args:
        buffers: the first eight arguments of `unroll_acknowledge_kernel`.
        constants: of the exchange.
        block: local tokens of one program.

    Returns:
        The launch. Its grid depends on the batch: give it `overlap_mtp.kernels.unroll.unroll_grid`.
    """
    return Launch(unroll_acknowledge_kernel, buffers, (1, 1, 1), C=constants, BLOCK=block)


def acknowledge(
    metadata: torch.Tensor, sources: torch.Tensor, unrolled: torch.Tensor, constants: ExchangeConstants
) -> Launch:
    """Bind the kernel that acknowledges an exchange which nobody will unroll, and the one that was unrolled last.

    Args:
        metadata: as `put_pack` left it.
        sources: as for `unroll_acknowledge`.
        unrolled: as for `unroll_acknowledge`. The unroll of that exchange must have ended before this launch begins.
        constants: of the exchange.

    Returns:
        The launch.
    """
    return Launch(acknowledge_kernel, (metadata, sources, unrolled), (1, 1, 1), C=constants)
