"""The kernels of tokens in plain torch, on any device. The Triton kernels must give the same rolls, bit for bit.

`pack` and `unroll` also serve exchanges between CPU ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from overlap_mtp.exchange.plan import CU_SEQLENS, FINGERPRINT, HEADER, NUM_DOCUMENTS, SEQ_LEN, ExchangePlan
from overlap_mtp.layout import TAIL

if TYPE_CHECKING:  # triton is not needed here
    from overlap_mtp.kernels.common import ExchangeConstants


def pack(
    tensors: Sequence[torch.Tensor], metadata: torch.Tensor, plan: ExchangePlan, send_buffer: torch.Tensor
) -> None:
    """Gather the tokens that peers need into the send buffer.

    Args:
        tensors: [B, L] each, viewed as integers of their own width.
        metadata: of the batch, int64 (overlap_mtp.exchange.plan).
        plan: of this rank.
        send_buffer: int64 [num_send_rows, len(tensors) * B]. It is written whole.
    """
    local_index = sent_tokens(metadata, plan)
    tokens = torch.cat([t.long() for t in tensors])  # [len(tensors) * B, L]
    send_buffer.copy_(torch.where(local_index >= 0, tokens[:, local_index.clamp(min=0)], 0).T)
    sequence = torch.from_numpy(plan.table[: plan.num_send_rows])
    send_buffer[sequence == HEADER] = metadata[FINGERPRINT]


def unroll(
    tensors: Sequence[torch.Tensor],
    outputs: Sequence[Sequence[torch.Tensor]],
    fills: Sequence[int],
    metadata: torch.Tensor,
    plan: ExchangePlan,
    recv_buffer: torch.Tensor,
    error_flags: torch.Tensor,
) -> None:
    """Write the rolls of every tensor, at depths 1 .. num_depths or as many as it has outputs.

    Args:
        tensors: as for `pack`.
        outputs: for each tensor, one [B, L] for each depth, viewed as integers of their own width.
        fills: for each tensor, what a token past its document's end becomes, as such an integer.
        metadata: as for `pack`.
        plan: of this rank.
        recv_buffer: int64 [num_recv_rows, len(tensors) * B].
        error_flags: int32. Its first word becomes 1 + i if the header of the i-th source is not this fingerprint.
    """
    rows, length = tensors[0].shape
    source = sources(metadata, plan, length)
    for index, (tensor, fill) in enumerate(zip(tensors, fills, strict=True)):
        received = recv_buffer[:, index * rows : (index + 1) * rows].T.to(tensor.dtype)
        known = torch.cat([tensor, received, tensor.new_full((rows, 1), fill)], dim=1)
        for depth, output in enumerate(outputs[index]):
            output.copy_(known[:, source[depth]])  # -1: the last column
    headers = torch.from_numpy(plan.table[plan.headers_at :]).long()
    wrong = torch.nonzero(recv_buffer[headers, 0] != metadata[FINGERPRINT])
    if wrong.numel():
        error_flags[0] = 1 + int(wrong[-1])


def put_pack(
    tensors: Sequence[torch.Tensor],
    metadata: torch.Tensor,
    plans: Sequence[ExchangePlan],
    memories: Sequence[torch.Tensor],
    seq_no: int,
    constants: ExchangeConstants,
) -> None:
    """Pack into the peers' memory and signal it, and acknowledge the exchange before. The peers must have acknowledged
    the one before in the buffer. It writes all rows, the kernel only those that the batch uses.

    Args:
        tensors: as for `pack`.
        metadata: as for `pack`.
        plans: of all ranks.
        memories: the symmetric memory of all ranks, int64.
        seq_no: the number of the exchange, 1 for the first.
        constants: of this rank.
    """
    plan = plans[constants.cp_rank]
    send_buffer = metadata.new_zeros(plan.num_send_rows, len(tensors) * tensors[0].shape[0])
    pack(tensors, metadata, plan, send_buffer)
    for peer in plan.destinations:
        message = send_buffer[plan.first_send_row(peer) :][: plan.send_rows[peer]]
        first = plans[peer].first_recv_row(plan.cp_rank)
        _buffer(memories[peer], seq_no, constants, send_buffer.shape[1])[first : first + len(message)] = (
            message
        )
        for part in range(constants.num_parts):
            at = _flag_at(constants.signals_at, seq_no, plan.cp_rank, constants, part, constants.num_parts)
            memories[peer][at] = seq_no
    before = seq_no - 1
    for source in plan.sources if before else ():
        at = _flag_at(constants.acknowledgements_at, before, plan.cp_rank, constants)
        memories[source][at] = before


def wait_unroll(
    tensors: Sequence[torch.Tensor],
    outputs: Sequence[Sequence[torch.Tensor]],
    fills: Sequence[int],
    metadata: torch.Tensor,
    plan: ExchangePlan,
    memories: Sequence[torch.Tensor],
    seq_no: int,
    constants: ExchangeConstants,
    error_flags: torch.Tensor,
) -> None:
    """Unroll from this rank's memory. All sources must have signalled.

    Args: as for `unroll` and `put_pack`.
    """
    memory = memories[plan.cp_rank]
    for source in plan.sources:
        at = _flag_at(constants.signals_at, seq_no, source, constants, 0, constants.num_parts)
        assert memory[at] >= seq_no
    words = len(tensors) * tensors[0].shape[0]
    recv_buffer = _buffer(memory, seq_no, constants, words)[: plan.num_recv_rows]
    unroll(tensors, outputs, fills, metadata, plan, recv_buffer, error_flags)


def sent_tokens(metadata: torch.Tensor, plan: ExchangePlan) -> torch.Tensor:
    """Find which token each outgoing row carries.

    Args:
        metadata: as for `pack`.
        plan: of this rank.

    Returns:
        int64 [num_send_rows]: a local_index, or -1 for headers and rows that the batch does not use.
    """
    sequence, held, offset = torch.from_numpy(plan.table[: plan.routes_at]).view(3, -1).long().unbind()
    sequences = metadata[NUM_DOCUMENTS] if plan.by_document else 1
    used = (sequence >= 0) & (sequence < sequences)
    start, chunk_len = _bounds(metadata, torch.where(used, sequence, 0), plan)
    used &= offset < chunk_len
    return torch.where(used, start // plan.cp_size + held * chunk_len + offset, -1)


def sources(metadata: torch.Tensor, plan: ExchangePlan, length: int) -> torch.Tensor:
    """Find where the token `depth` after each local token is.

    Args:
        metadata: as for `pack`.
        plan: of this rank.
        length: local tokens L.

    Returns:
        int64 [num_depths, L]: a local_index; L + a received row; or -1 if there is no such token.
    """
    documents = int(metadata[NUM_DOCUMENTS])
    begins = metadata[CU_SEQLENS : CU_SEQLENS + documents]
    local_index = torch.arange(length, device=metadata.device)
    if plan.by_document:
        sequence = torch.searchsorted(begins, local_index * plan.cp_size, right=True) - 1
    else:
        sequence = torch.zeros_like(local_index)
    start, chunk_len = _bounds(metadata, sequence, plan)
    chunk_len = chunk_len.clamp(min=1)
    within = local_index - start // plan.cp_size
    held = (within // chunk_len).clamp(max=plan.num_held - 1)
    offset = within - held * chunk_len
    position = start + torch.tensor(plan.held_chunks, device=metadata.device)[held] * chunk_len + offset
    document = sequence if plan.by_document else torch.searchsorted(begins, position, right=True) - 1
    valid_end = metadata[plan.valid_ends_at + document]

    depth = torch.arange(1, plan.num_depths + 1, device=metadata.device)[:, None]
    ahead = offset + depth  # [num_depths, L]
    chunk_distance = (ahead // chunk_len).clamp(max=plan.num_depths)  # more only in a tail
    beyond = ahead - chunk_distance * chunk_len
    routes = torch.from_numpy(plan.table[plan.routes_at : plan.headers_at]).view(plan.num_held, -1, 2).long()
    code, stride = routes[held, chunk_distance].unbind(-1)
    here = start // plan.cp_size + (-1 - code) * chunk_len + beyond
    there = length + code + sequence * stride + beyond
    source = torch.where(position + depth < valid_end, torch.where(code < 0, here, there), -1)
    return torch.where(valid_end == TAIL, local_index, source)


def _bounds(
    metadata: torch.Tensor, sequence: torch.Tensor, plan: ExchangePlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """(start, chunk length) of sequences."""
    if plan.by_document:
        start, end = metadata[CU_SEQLENS + sequence], metadata[CU_SEQLENS + 1 + sequence]
    else:
        start, end = torch.zeros_like(sequence), metadata[SEQ_LEN].expand_as(sequence)
    return start, (end - start) // plan.num_chunks


def _buffer(memory: torch.Tensor, seq_no: int, constants: ExchangeConstants, words: int) -> torch.Tensor:
    """The rows of an exchange's buffer, [rows, words]."""
    at = seq_no % constants.num_buffers * constants.buffer_words
    return memory[at : at + constants.buffer_words // words * words].view(-1, words)


def _flag_at(
    flags_at: int, seq_no: int, rank: int, constants: ExchangeConstants, part: int = 0, parts: int = 1
) -> int:
    flag = seq_no % constants.num_buffers * constants.cp_size + rank
    return flags_at + (flag * parts + part) * constants.flag_words
