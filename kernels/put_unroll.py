"""A whole exchange over symmetric memory in one launch: put, wait and unroll at the same time, in different programs.

    for each peer that needs tokens     `put_pack`: pack them into its memory, signal it
    one                                 acknowledge the exchange before: launches of a transport run one after the other
    for each peer that has tokens       `wait_unroll`: wait for them, write them to the rolls
    all others                          write what this rank holds to the rolls

So the rolls are complete when the launch ends, and no join has to copy. A message travels in parts, each with a signal
of its own, and programs share them. At most MAX_WAITING programs put, and as many wait for peers (one for each peer if
there are more): a program that waits keeps its place on the device. Nothing in the launch waits for those.

The first join was a kernel on the compute stream. It took 13 to 18 us where NCCL's copy took 5 (4 x H100). 2 to 4
us were its looks at the peers' flags: each program looked, with acquire semantics, which throws away the
first-level cache. 3 us were two other things: it counted its programs, and the last one told the peers that buffers
are free. A kernel ends only when such stores have reached the peer. The rest was the copy. (The parts are those of
a stall of 11 to 15 us on 4 x H200.) Here nothing counts, the acknowledgement travels with the next exchange, and
all of it runs beside the compute.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from overlap_mtp.kernels.common import ExchangeConstants, local_len_of, metadata_of
from overlap_mtp.kernels.launch import Launch
from overlap_mtp.kernels.put_pack import PEER_WORDS, SOURCE_WORDS, acknowledge, put_pack
from overlap_mtp.kernels.unroll import keep_for_replays, store_rolls
from overlap_mtp.kernels.wait_unroll import wait_unroll


@triton.jit
def put_unroll_kernel(
    metadata,  # int64 [addresses_end], may be pinned host memory
    replay_metadata,  # the same, on the device
    plan_table,  # with ExchangePlan.asked behind it
    tensor_table,
    peers,  # int64 [num_destinations, PEER_WORDS], then [num_sources, SOURCE_WORDS]
    memory,  # this rank's symmetric memory
    seq_nos,  # int64 [num_counting]
    error_flags,
    timeout,  # int64 [1], 0 after something has failed
    C: tl.constexpr,
    FIRST: tl.constexpr,  # the first program that is launched
    BLOCK: tl.constexpr,  # own tokens that a program handles at a time
):
    PUTTING: tl.constexpr = C.num_destinations * C.num_shares
    OWN: tl.constexpr = PUTTING + 1 + C.num_sources * C.num_shares
    TENSOR_ROWS: tl.constexpr = C.num_tensors * C.batch_rows
    program = tl.program_id(0) + FIRST
    source = metadata_of(metadata, replay_metadata, C)
    if program >= OWN:
        own = program - OWN
        depth = own % C.num_depths
        tensor_row = own // C.num_depths % TENSOR_ROWS
        first = own // (C.num_depths * TENSOR_ROWS)
        step = (tl.num_programs(0) + FIRST - OWN) // (C.num_depths * TENSOR_ROWS)
        for block in range(first, tl.cdiv(local_len_of(source, C), BLOCK), step):
            store_rolls(source, plan_table, tensor_table, None, block, depth, tensor_row, C, BLOCK)
    else:
        sources = peers + C.num_destinations * PEER_WORDS
        seq_no = tl.load(seq_nos + program) + 1
        if program < PUTTING:
            peer = peers + program // C.num_shares * PEER_WORDS
            for part in range(program % C.num_shares, C.num_parts, C.num_shares):
                put_pack(
                    source, plan_table, tensor_table, peer, part, seq_no, memory, error_flags, timeout, C
                )
        elif program == PUTTING:
            acknowledge(sources, seq_no - 1, C)
            keep_for_replays(source, replay_metadata, C)
        else:
            number = (program - PUTTING - 1) // C.num_shares
            share = (program - PUTTING - 1) % C.num_shares
            for part in range(share, C.num_parts, C.num_shares):
                wait_unroll(
                    *(source, plan_table, tensor_table, sources + number * SOURCE_WORDS, number, part),
                    *(seq_no, memory, error_flags, timeout, C),
                )
        tl.store(seq_nos + program, seq_no)


def num_counting(constants: ExchangeConstants) -> int:
    """How many programs count exchanges: those that put, acknowledge or wait."""
    return (constants.num_destinations + constants.num_sources) * constants.num_shares + 1


def put_unroll(
    buffers: tuple[torch.Tensor, ...],
    constants: ExchangeConstants,
    local_len: int,
    first: int = 0,
    block: int = 256,
) -> Launch:
    """Bind the kernel to its buffers. `put_pack` and `wait_unroll` of `overlap_mtp.kernels.reference` do the same.

    `error_flags` says whose acknowledgement or tokens are late. The rolls hold the fill in place of late tokens.

    Args:
        buffers: the first nine arguments of `put_unroll_kernel`. `metadata` holds the metadata of the batch, the
            addresses of its tensors and those of its rolls. `replay_metadata` replaces it if the constants say so and
            its fingerprint is not negative: a captured graph gets other documents in this way. `plan_table` is
            ExchangePlan.table and then ExchangePlan.asked; `tensor_table` is ExchangeSpec.table.
        constants: of the exchange.
        local_len: tokens a rank that the number of programs is good for. Batches may have others.
        first: the first program that is launched. Ranks that are simulated one after the other put before they wait.
        block: local tokens that a program handles at a time.

    Returns:
        The launch.
    """
    tensor_rows = constants.num_depths * constants.num_tensors * constants.batch_rows
    programs = num_counting(constants) + triton.cdiv(local_len, block) * tensor_rows
    grid = (programs - first, 1, 1)
    return Launch(put_unroll_kernel, buffers, grid, C=constants, FIRST=first, BLOCK=block)
