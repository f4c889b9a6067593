"""The kernels in plain torch, on any device. What the Triton kernels must equal, bit for bit, and what runs where
there is no GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from overlap_mtp.exchange.plan import CU_SEQLENS, FINGERPRINT, HEADER, NUM_DOCUMENTS, SEQ_LEN, PlanShape


def pack(
    tensors: Sequence[torch.Tensor],
    record: torch.Tensor,
    table: torch.Tensor,
    shape: PlanShape,
    wire: torch.Tensor,
) -> None:
    """Gathers the tokens that peers need into the outgoing wire.

    `tensors`: [B, L] each, viewed as integers of their own width; `record`: the batch's, int64 (exchange.plan);
    `table`: PlanShape.table; `wire`: int64 [num_send_rows, len(tensors) * B], written whole.
    """
    unit, held, offset = table[: shape.routes_at].view(3, -1).long().unbind()
    units = record[NUM_DOCUMENTS] if shape.by_document else 1
    used = (unit >= 0) & (unit < units)
    start, size = _units(record, torch.where(used, unit, 0), shape)
    used &= offset < size
    slot = torch.where(used, start // shape.cp_size + held * size + offset, 0)
    tokens = torch.cat([t.long() for t in tensors])  # [len(tensors) * B, L]
    wire.copy_(torch.where(used, tokens[:, slot], 0).T)
    wire[unit == HEADER] = record[FINGERPRINT]


def unroll(
    tensors: Sequence[torch.Tensor],
    outputs: Sequence[Sequence[torch.Tensor]],
    fills: Sequence[int],
    record: torch.Tensor,
    table: torch.Tensor,
    shape: PlanShape,
    wire: torch.Tensor,
    trouble: torch.Tensor,
) -> None:
    """Writes every tensor's rolls of depths 1 .. num_depths.

    `tensors`: [B, L] each and `outputs`: one [B, L] for each tensor and depth, viewed as integers of their own
    width; `fills`: what a token past its document's end becomes, in the same view; `wire`: the received int64
    [num_recv_rows, len(tensors) * B]; `trouble`: int32, whose first word becomes 1 + i where the header of the i-th
    source is not this plan's fingerprint. The others are those of `pack`.
    """
    rows, length = tensors[0].shape
    source = sources(record, table, shape, length)
    for index, (tensor, fill) in enumerate(zip(tensors, fills, strict=True)):
        received = wire[:, index * rows : (index + 1) * rows].T.to(tensor.dtype)
        known = torch.cat([tensor, received, tensor.new_full((rows, 1), fill)], dim=1)
        for depth in range(shape.num_depths):
            outputs[index][depth].copy_(known[:, source[depth]])  # -1: the last column
    headers = table[shape.headers_at :].long()
    wrong = torch.nonzero(wire[headers, 0] != record[FINGERPRINT])
    if wrong.numel():
        trouble[0] = 1 + int(wrong[-1])


def sources(record: torch.Tensor, table: torch.Tensor, shape: PlanShape, length: int) -> torch.Tensor:
    """Where the token `depth` ahead of each slot is: a slot; L + a row of the incoming wire; -1. [num_depths, L]"""
    documents = int(record[NUM_DOCUMENTS])
    begins = record[CU_SEQLENS : CU_SEQLENS + documents]
    slot = torch.arange(length)
    if shape.by_document:
        unit = torch.searchsorted(begins, slot * shape.cp_size, right=True) - 1
    else:
        unit = torch.zeros_like(slot)
    start, size = _units(record, unit, shape)
    size = size.clamp(min=1)
    within = slot - start // shape.cp_size
    held = (within // size).clamp(max=shape.num_held - 1)
    offset = within - held * size
    position = start + torch.tensor(shape.held_chunks)[held] * size + offset
    document = unit if shape.by_document else torch.searchsorted(begins, position, right=True) - 1
    valid_end = record[shape.valid_ends_at + document]

    depth = torch.arange(1, shape.num_depths + 1)[:, None]
    ahead = offset + depth  # [num_depths, L]
    gap = ahead // size
    beyond = ahead - gap * size
    routes = table[shape.routes_at : shape.headers_at].view(shape.num_held, -1, 2).long()
    code, stride = routes[held, gap].unbind(-1)
    here = start // shape.cp_size + (-1 - code) * size + beyond
    there = length + code + unit * stride + beyond
    return torch.where(position + depth < valid_end, torch.where(code < 0, here, there), -1)


def _units(record: torch.Tensor, unit: torch.Tensor, shape: PlanShape) -> tuple[torch.Tensor, torch.Tensor]:
    """(start, chunk size) of units."""
    if shape.by_document:
        start, end = record[CU_SEQLENS + unit], record[CU_SEQLENS + 1 + unit]
    else:
        start, end = torch.zeros_like(unit), record[SEQ_LEN].expand_as(unit)
    return start, (end - start) // shape.num_chunks
