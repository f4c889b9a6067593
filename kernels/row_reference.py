"""The kernels of activations in plain torch, on any device. They also serve exchanges between CPU ranks.

All tensors are sequence first, [S, ...]: views are enough. A row of a buffer holds one token of every tensor, one after
the other, and filler up to a multiple of 16 bytes. Sums are computed in float32, or in float64 for that dtype, and are
rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from overlap_mtp.exchange.rows import HEADER

Tensors = Sequence[torch.Tensor]


def pack_rows(tensors: Tensors, index: torch.Tensor, rows: torch.Tensor, fingerprint: int) -> None:
    """Copy rows into a buffer.

    Args:
        tensors: [S, ...] each, of one dtype.
        index: int64 [R]: which row goes to each row of the buffer; HEADER for the fingerprint; -1 leaves it as it is.
        rows: [R, elements of a row], of the tensors' dtype.
        fingerprint: the first 8 bytes of a header.
    """
    _write_headers(index, rows, fingerprint)
    at = (index >= 0).nonzero()[:, 0]
    for tensor, columns in zip(tensors, _columns(tensors, rows), strict=True):
        columns[at] = tensor[index[at]].flatten(1)


def unroll_own_rows(tensors: Tensors, source: torch.Tensor, rolls: Sequence[Tensors]) -> None:
    """Write those rows of the rolls that come from this rank's own tensors, and zeros where nothing follows.

    Args:
        tensors: [S, ...] each, of one dtype.
        source: int64 [num_depths, S]: a row of the tensors; -1 for zeros; S or more leaves the row as it is.
        rolls: for each depth, one [S, ...] for each tensor.
    """
    for index, rolled in zip(source, rolls, strict=True):
        is_own = index < len(index)
        for tensor, roll in zip(tensors, rolled, strict=True):
            known = torch.cat([tensor, torch.zeros_like(tensor[:1])])  # -1: the last row
            roll[is_own] = known[index[is_own]]


def unroll_received_rows(rows: torch.Tensor, back: torch.Tensor, rolls: Sequence[Tensors]) -> None:
    """Write those rows of the rolls that other ranks sent.

    Args:
        rows: the buffer, [R, elements of a row].
        back: int64 [num_depths, R]: to which rolled row each row of the buffer goes; negative for none.
        rolls: for each depth, one [S, ...] for each tensor.
    """
    for index, rolled in zip(back, rolls, strict=True):
        known = index >= 0
        for roll, columns in zip(rolled, _columns(rolled, rows), strict=True):
            roll[index[known]] = columns[known].view(-1, *roll.shape[1:])


def sum_rows(gradients: Sequence[Tensors], back: torch.Tensor, sums: Tensors) -> None:
    """Add up the gradients of the rolls of each own row, from the smallest depth to the largest.

    Args:
        gradients: for each depth, one [S, ...] for each tensor.
        back: int64 [num_depths, S]: which rolled row each row went to; -1 for none.
        sums: [S, ...] for each tensor. They are written whole.
    """
    for n, target in enumerate(sums):
        target.copy_(_summed([one[n] for one in gradients], back, target))


def pack_sums(gradients: Sequence[Tensors], back: torch.Tensor, rows: torch.Tensor, fingerprint: int) -> None:
    """As `sum_rows`, for the rows of a buffer.

    Args:
        gradients: as for `sum_rows`.
        back: int64 [num_depths, R]. The first depth has HEADER for headers.
        rows: [R, elements of a row]. What stands for tensors is written whole.
        fingerprint: as for `pack_rows`.
    """
    for n, columns in enumerate(_columns(gradients[0], rows)):
        flat = [one[n].flatten(1) for one in gradients]
        columns.copy_(_summed(flat, back, columns))
    _write_headers(back[0], rows, fingerprint)


def add_rows(rows: torch.Tensor, returned_to: torch.Tensor, returned: torch.Tensor, sums: Tensors) -> None:
    """Add rows of a buffer to rows of tensors, in the order of `returned`.

    Args:
        rows: [R, elements of a row].
        returned_to: int64 [n]: different rows of the tensors.
        returned: int64 [most uses, n]: the rows of the buffer that are added to each; -1 for none.
        sums: [S, ...] for each tensor.
    """
    for target, columns in zip(sums, _columns(sums, rows), strict=True):
        total = target[returned_to].to(_precise(target)).flatten(1)
        for at in returned:
            total += torch.where((at >= 0)[:, None], columns[at], 0)
        target[returned_to] = total.to(target.dtype).view(-1, *target.shape[1:])


def _summed(gradients: Tensors, back: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((back.shape[1], *like.shape[1:]), dtype=_precise(like), device=like.device)
    for gradient, index in zip(gradients, back, strict=True):
        at = (index >= 0).nonzero()[:, 0]
        total[at] += gradient[index[at]]
    return total


def _write_headers(index: torch.Tensor, rows: torch.Tensor, fingerprint: int) -> None:
    rows.view(torch.int64)[index == HEADER, 0] = fingerprint


def _precise(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _columns(tensors: Tensors, rows: torch.Tensor) -> Tensors:
    """The part of a buffer's rows that stands for each tensor, [R, elements]."""
    sizes = [tensor[0].numel() for tensor in tensors]
    columns: tuple[torch.Tensor, ...] = rows[:, : sum(sizes)].split(sizes, 1)
    return columns
