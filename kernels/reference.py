"""The kernels in plain torch: the same signatures, on any device. What the Triton kernels must equal, bit for
bit, and what runs where there is no GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from overlap_mtp.plan import HEADER, NOWHERE, PlanShape


def pack(tensors: Sequence[torch.Tensor], table: torch.Tensor, shape: PlanShape, wire: torch.Tensor) -> None:
    """Gathers the tokens that peers need into the outgoing wire.

    `tensors`: [B, L] each, viewed as integers of their own width; `table`: RollPlan.table as an int32 tensor;
    `wire`: int64 [num_send_rows, len(tensors) * B], written whole.
    """
    slots = table[: shape.num_send_rows].long()
    tokens = torch.cat([t.long() for t in tensors])  # [len(tensors) * B, L]
    wire.copy_(tokens[:, slots.clamp(min=0)].T)
    wire[slots == NOWHERE] = 0
    wire[slots == HEADER] = table[shape.fingerprint_at].long()


def unroll(
    tensors: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    fills: Sequence[int],
    table: torch.Tensor,
    shape: PlanShape,
    wire: torch.Tensor,
    mismatch: torch.Tensor,
) -> None:
    """Writes every tensor's rolls of depths 1 .. num_depths.

    `tensors`: [B, L] each and `outputs`: [num_depths * B, L] each, viewed as integers of their own width;
    `fills`: what a token past its document's end becomes, in the same view; `wire`: the received int64
    [num_recv_rows, len(tensors) * B]; `mismatch`: int32 [1], set to 1 + i where the header of the i-th source
    is not this plan's fingerprint.
    """
    rows, length = tensors[0].shape
    run_begin = table[shape.run_begin_at : shape.run_end_at]
    run_end = table[shape.run_end_at : shape.halo_at]
    halo = table[shape.halo_at : shape.headers_at].view(shape.max_runs, shape.num_depths)

    slot = torch.arange(length, device=table.device, dtype=torch.int32)
    run = torch.searchsorted(run_begin, slot, right=True) - 1  # [L]
    depth = torch.arange(1, shape.num_depths + 1, device=table.device)[:, None]
    ahead = slot + depth  # [num_depths, L]
    past = ahead - run_end[run]
    beyond = torch.where(past < shape.num_depths, halo[run, past.clamp(0, shape.num_depths - 1)], NOWHERE)
    source = torch.where(past < 0, ahead, beyond)

    for index, (tensor, output, fill) in enumerate(zip(tensors, outputs, fills, strict=True)):
        received = wire[:, index * rows : (index + 1) * rows].T.to(tensor.dtype)
        known = torch.cat([tensor, received, tensor.new_full((rows, 1), fill)], dim=1)
        output.view(-1, rows, length).copy_(known[:, source].transpose(0, 1))  # NOWHERE = -1: the last column

    headers = table[shape.headers_at : shape.fingerprint_at].long()
    wrong = torch.nonzero(wire[headers, 0] != table[shape.fingerprint_at])
    if wrong.numel():
        mismatch.fill_(1 + int(wrong[-1]))
