"""Rolls of activations and their gradients. `overlap_mtp.kernels.row_reference` is the same in plain torch.

Each function launches one kernel for each tensor, whatever the documents and depths. A program handles a tile: some
rows, and up to 2 KiB of each. Copies move bits. Sums are computed in float32, or in float64 for that dtype, and are
rounded once.

Tensors are sequence first: views of contiguous [S, H], [S, B, H] or [B, S, H]. All tensors of a call have one order.
The numbers of rows and tokens change from batch to batch, and so does the alignment of the maps. Kernels are not
compiled again for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from overlap_mtp.exchange.rows import HEADER, NOTHING
from overlap_mtp.kernels.common import as_pointer
from overlap_mtp.kernels.launch import Dispatch, Grid

Tensors = Sequence[torch.Tensor]

HEADER_AT = tl.constexpr(HEADER)
NOTHING_AT = tl.constexpr(NOTHING)
STRIP_BYTES = 2048  # of a row: 16 bytes for each thread of 4 warps
TILE_BYTES = 8192


class RowConstants(NamedTuple):
    """All that is fixed for one tensor of an exchange. The kernels take it as one constant, `C`."""

    batch_rows: int  # 1 if what a token has in all of them lies together
    hidden: int  # elements of a token in one of them
    itemsize: int
    column: int  # where the tensor begins in a row of the buffer
    elements: int  # of a row of the buffer
    num_depths: int
    num_headers: int
    block_rows: int
    block: int  # elements

    @classmethod
    @lru_cache(maxsize=1024)
    def of(
        cls,
        order: tuple[int, int],
        itemsize: int,
        column: int,
        elements: int,
        num_depths: int,
        num_headers: int,
    ) -> RowConstants:
        """Collect the constants of a launch, and choose its tiles.

        Args:
            order: batch_rows and hidden.
            itemsize, column, elements, num_depths, num_headers: as above.

        Returns:
            The constants.
        """
        block = min(triton.next_power_of_2(order[1]), STRIP_BYTES // itemsize)
        block_rows = TILE_BYTES // (block * itemsize)
        return cls(*order, itemsize, column, elements, num_depths, num_headers, block_rows, block)


@triton.jit
def tile_of(count, C: tl.constexpr):
    """(rows, whether there are such, elements [1, block], which of the tile there are) of this program."""
    row = tl.program_id(0) * C.block_rows + tl.arange(0, C.block_rows)
    element = (tl.program_id(1) * C.block + tl.arange(0, C.block))[None, :]
    known = row < count
    return row, known, element, known[:, None] & (element < C.hidden)


@triton.jit
def in_tensor(token, length, C: tl.constexpr):
    """Where tokens [block_rows] begin in a tensor, in this program's batch row."""
    return ((tl.program_id(2) * length.to(tl.int64) + token) * C.hidden)[:, None]


@triton.jit
def in_buffer(row, C: tl.constexpr):
    """Where rows [block_rows] of a buffer hold this program's batch row of the tensor."""
    return row.to(tl.int64)[:, None] * C.elements + (C.column + tl.program_id(2) * C.hidden)


@triton.jit
def write_headers(rows, row, is_header, fingerprint, C: tl.constexpr):
    if C.column == 0:
        if tl.program_id(1) + tl.program_id(2) == 0:
            tl.store(as_pointer(rows + row.to(tl.int64) * C.elements, 8), fingerprint, mask=is_header)


@triton.jit
def check_headers(rows, header_rows, header_peers, fingerprint, error_flags, C: tl.constexpr):
    """Set error_flags[0] to 1 + a peer if the header of its message is not the fingerprint."""
    if C.num_headers > 0:
        if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
            wrong = 0
            NUM_HEADERS: tl.constexpr = C.num_headers
            for i in tl.static_range(NUM_HEADERS):
                row = tl.load(header_rows + i).to(tl.int64)
                received = tl.load(as_pointer(rows + row * C.elements, 8))
                wrong = tl.where(received == fingerprint, wrong, 1 + tl.load(header_peers + i))
            if wrong > 0:
                tl.store(error_flags, wrong)


@triton.jit(do_not_specialize=["length", "index", "count", "fingerprint"])
def pack_rows_kernel(
    tensor,
    length,
    index,  # [count]
    count,
    rows,
    fingerprint: tl.int64,
    C: tl.constexpr,
):
    row, known, element, inside = tile_of(count, C)
    token = tl.load(index + row, mask=known, other=NOTHING_AT)
    inside = inside & (token >= 0)[:, None]
    words = tl.load(
        as_pointer(tensor, C.itemsize) + in_tensor(token, length, C) + element, mask=inside, other=0
    )
    tl.store(as_pointer(rows, C.itemsize) + in_buffer(row, C) + element, words, mask=inside)
    write_headers(rows, row, token == HEADER_AT, fingerprint, C)


@triton.jit(do_not_specialize=["length", "source"])
def unroll_own_rows_kernel(
    tensor,
    length,
    source,  # [num_depths, length]
    rolls,  # a tensor for each depth
    C: tl.constexpr,
):
    row, known, element, inside = tile_of(length, C)
    NUM_DEPTHS: tl.constexpr = C.num_depths
    for depth in tl.static_range(NUM_DEPTHS):
        at = tl.load(source + depth * length + row, mask=known, other=NOTHING_AT)
        is_own = inside & (at < length)[:, None]
        words = tl.load(
            as_pointer(tensor, C.itemsize) + in_tensor(at, length, C) + element,
            mask=is_own & (at >= 0)[:, None],
            other=0,
        )
        to = as_pointer(rolls[depth], C.itemsize) + in_tensor(row, length, C) + element
        tl.store(to, words, mask=is_own)


@triton.jit(
    do_not_specialize=[
        *("back", "count", "length"),
        *("header_rows", "header_peers", "fingerprint", "error_flags"),
    ]
)
def unroll_received_rows_kernel(
    rows,
    back,  # [num_depths, count]
    count,
    rolls,  # a tensor for each depth
    length,
    header_rows,
    header_peers,
    fingerprint: tl.int64,
    error_flags,
    C: tl.constexpr,
):
    row, known, element, inside = tile_of(count, C)
    NUM_DEPTHS: tl.constexpr = C.num_depths
    words = tl.load(as_pointer(rows, C.itemsize) + in_buffer(row, C) + element, mask=inside, other=0)
    for depth in tl.static_range(NUM_DEPTHS):
        to = tl.load(back + depth * count + row, mask=known, other=NOTHING_AT)
        roll = as_pointer(rolls[depth], C.itemsize) + in_tensor(to, length, C) + element
        tl.store(roll, words, mask=inside & (to >= 0)[:, None])
    check_headers(rows, header_rows, header_peers, fingerprint, error_flags, C)


@triton.jit
def summed(gradients, length, back, row, known, element, inside, count, C: tl.constexpr):
    """The sum over the depths of this program's tile, in the precise dtype."""
    PRECISE: tl.constexpr = tl.float64 if C.itemsize == 8 else tl.float32
    BLOCK_ROWS: tl.constexpr = C.block_rows
    BLOCK: tl.constexpr = C.block
    total = tl.zeros([BLOCK_ROWS, BLOCK], PRECISE)
    NUM_DEPTHS: tl.constexpr = C.num_depths
    for depth in tl.static_range(NUM_DEPTHS):
        at = tl.load(back + depth * count + row, mask=known, other=NOTHING_AT)
        gradient = gradients[depth] + in_tensor(at, length, C) + element
        total += tl.load(gradient, mask=inside & (at >= 0)[:, None], other=0).to(PRECISE)
    return total


@triton.jit(do_not_specialize=["length", "back"])
def sum_rows_kernel(
    gradients,  # a tensor for each depth
    length,
    back,  # [num_depths, length]
    sums,
    C: tl.constexpr,
):
    row, known, element, inside = tile_of(length, C)
    total = summed(gradients, length, back, row, known, element, inside, length, C)
    tl.store(sums + in_tensor(row, length, C) + element, total.to(sums.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "back", "count", "fingerprint"])
def pack_sums_kernel(
    gradients,  # a tensor for each depth
    length,
    back,  # [num_depths, count]
    count,
    rows,
    fingerprint: tl.int64,
    C: tl.constexpr,
):
    row, known, element, inside = tile_of(count, C)
    total = summed(gradients, length, back, row, known, element, inside, count, C)
    is_header = tl.load(back + row, mask=known, other=NOTHING_AT) == HEADER_AT
    to = rows + in_buffer(row, C) + element
    tl.store(to, total.to(rows.dtype.element_ty), mask=inside & ~is_header[:, None])
    write_headers(rows, row, is_header, fingerprint, C)


@triton.jit(
    do_not_specialize=[
        *("returned_to", "returned", "uses", "count", "length"),
        *("header_rows", "header_peers", "fingerprint", "error_flags"),
    ]
)
def add_rows_kernel(
    rows,
    returned_to,  # [count]
    returned,  # [uses, count]
    uses,
    count,
    sums,
    length,
    header_rows,
    header_peers,
    fingerprint: tl.int64,
    error_flags,
    C: tl.constexpr,
):
    row, known, element, inside = tile_of(count, C)
    token = tl.load(returned_to + row, mask=known, other=NOTHING_AT)
    inside = inside & (token >= 0)[:, None]
    PRECISE: tl.constexpr = tl.float64 if C.itemsize == 8 else tl.float32
    target = sums + in_tensor(token, length, C) + element
    total = tl.load(target, mask=inside, other=0).to(PRECISE)
    for use in range(uses):
        at = tl.load(returned + use * count + row, mask=known, other=NOTHING_AT)
        gradient = rows + in_buffer(at, C) + element
        total += tl.load(gradient, mask=inside & (at >= 0)[:, None], other=0).to(PRECISE)
    tl.store(target, total.to(sums.dtype.element_ty), mask=inside)
    check_headers(rows, header_rows, header_peers, fingerprint, error_flags, C)


_launch_pack_rows = Dispatch(pack_rows_kernel)
_launch_unroll_own_rows = Dispatch(unroll_own_rows_kernel)
_launch_unroll_received_rows = Dispatch(unroll_received_rows_kernel)
_launch_sum_rows = Dispatch(sum_rows_kernel)
_launch_pack_sums = Dispatch(pack_sums_kernel)
_launch_add_rows = Dispatch(add_rows_kernel)


def pack_rows(tensors: Tensors, index: torch.Tensor, rows: torch.Tensor, fingerprint: int) -> None:
    """Copy rows into a buffer.

    Args:
        tensors: [S, ...] each, of one dtype.
        index: int32 [R]: which row goes to each row of the buffer; HEADER for the fingerprint; NOTHING leaves it as
            it is.
        rows: [R, elements of a row], of the tensors' dtype. A row is a multiple of 16 bytes.
        fingerprint: the first 8 bytes of a header. The rest of it stays as it is.
    """
    for tensor, column in zip(tensors, _columns(tensors), strict=True):
        constants = _constants([tensor], column, rows)
        arguments = (tensor, len(tensor), index, len(index), rows, fingerprint)
        _launch_pack_rows(_grid(len(index), constants), (tensor, rows), *arguments, C=constants)


def unroll_own_rows(tensors: Tensors, source: torch.Tensor, rolls: Sequence[Tensors]) -> None:
    """Write those rows of the rolls that come from this rank's own tensors, and zeros where nothing follows.

    Args:
        tensors: [S, ...] each, of one dtype.
        source: int32 [num_depths, S]: a row of the tensors; NOTHING for zeros; S or more leaves the row as it is.
        rolls: for each depth, one [S, ...] for each tensor.
    """
    for n, tensor in enumerate(tensors):
        outputs = tuple(depth[n] for depth in rolls)
        constants = _constants([tensor, *outputs], 0, None, len(outputs))
        arguments = (tensor, len(tensor), source, outputs)
        _launch_unroll_own_rows(_grid(len(tensor), constants), (tensor, *outputs), *arguments, C=constants)


def unroll_received_rows(
    rows: torch.Tensor,
    back: torch.Tensor,
    rolls: Sequence[Tensors],
    header_rows: torch.Tensor | None = None,
    header_peers: torch.Tensor | None = None,
    fingerprint: int = 0,
    error_flags: torch.Tensor | None = None,
) -> None:
    """Write those rows of the rolls that other ranks sent. If `header_rows` are given, check these headers.

    Args:
        rows: the buffer, [R, elements of a row].
        back: int32 [num_depths, R]: to which rolled row each row of the buffer goes; negative for none.
        rolls: for each depth, one [S, ...] for each tensor.
        header_rows: int32 [n], the rows of the buffer that must begin with the fingerprint.
        header_peers: int32 [n], the cp rank that each came from.
        fingerprint: of the exchange.
        error_flags: int32, may be pinned host memory. Its first word becomes 1 + the peer of a wrong header.
    """
    count = back.shape[1]
    for n, column in enumerate(_columns(rolls[0])):
        outputs = tuple(depth[n] for depth in rolls)
        constants = _constants(outputs, column, rows, len(outputs), header_rows)
        headers = _headers(constants, header_rows, header_peers, fingerprint, error_flags)
        arguments = (rows, back, count, outputs, len(outputs[0]), *headers)
        _launch_unroll_received_rows(_grid(count, constants), (rows, *outputs), *arguments, C=constants)


def sum_rows(gradients: Sequence[Tensors], back: torch.Tensor, sums: Tensors) -> None:
    """Add up the gradients of the rolls of each own row, from the smallest depth to the largest.

    Args:
        gradients: for each depth, one [S, ...] for each tensor.
        back: int32 [num_depths, S]: which rolled row each row went to; negative for none.
        sums: [S, ...] for each tensor. They are written whole.
    """
    for n, target in enumerate(sums):
        inputs = tuple(depth[n] for depth in gradients)
        constants = _constants([target, *inputs], 0, None, len(inputs))
        arguments = (inputs, len(target), back, target)
        _launch_sum_rows(_grid(len(target), constants), (target, *inputs), *arguments, C=constants)


def pack_sums(gradients: Sequence[Tensors], back: torch.Tensor, rows: torch.Tensor, fingerprint: int) -> None:
    """As `sum_rows`, for the rows of a buffer.

    Args:
        gradients: as for `sum_rows`.
        back: int32 [num_depths, R]. The first depth has HEADER for headers.
        rows: [R, elements of a row]. What stands for tensors is written whole, except in headers.
        fingerprint: as for `pack_rows`.
    """
    count = back.shape[1]
    for n, column in enumerate(_columns(gradients[0])):
        inputs = tuple(depth[n] for depth in gradients)
        constants = _constants(inputs, column, rows, len(inputs))
        arguments = (inputs, len(inputs[0]), back, count, rows, fingerprint)
        _launch_pack_sums(_grid(count, constants), (rows, *inputs), *arguments, C=constants)


def add_rows(
    rows: torch.Tensor,
    returned_to: torch.Tensor,
    returned: torch.Tensor,
    sums: Tensors,
    header_rows: torch.Tensor | None = None,
    header_peers: torch.Tensor | None = None,
    fingerprint: int = 0,
    error_flags: torch.Tensor | None = None,
) -> None:
    """Add rows of a buffer to rows of tensors, in the order of `returned`. Headers: as `unroll_received_rows`.

    Args:
        rows: [R, elements of a row].
        returned_to: int32 [n]: different rows of the tensors; NOTHING is skipped.
        returned: int32 [most uses, n]: the rows of the buffer that are added to each; NOTHING for none.
        sums: [S, ...] for each tensor.
        header_rows, header_peers, fingerprint, error_flags: as for `unroll_received_rows`.
    """
    uses, count = returned.shape
    for target, column in zip(sums, _columns(sums), strict=True):
        constants = _constants([target], column, rows, 0, header_rows)
        headers = _headers(constants, header_rows, header_peers, fingerprint, error_flags)
        arguments = (rows, returned_to, returned, uses, count, target, len(target), *headers)
        _launch_add_rows(_grid(count, constants), (rows, target), *arguments, C=constants)


def _columns(tensors: Tensors) -> list[int]:
    """Where each tensor begins in a row of a buffer."""
    columns, end = [], 0
    for tensor in tensors:
        columns.append(end)
        end += tensor.numel() // len(tensor)
    return columns


def _constants(
    tensors: Tensors,
    column: int,
    rows: torch.Tensor | None,
    num_depths: int = 0,
    header_rows: torch.Tensor | None = None,
) -> RowConstants:
    """The constants of a launch for tensors of one shape and order. The first tensor's checks the headers."""
    orders = {_order(tensor) for tensor in tensors}
    assert len(orders) == 1, orders
    num_headers = len(header_rows) if header_rows is not None and column == 0 else 0
    elements = rows.shape[1] if rows is not None else 0
    return RowConstants.of(orders.pop(), tensors[0].itemsize, column, elements, num_depths, num_headers)


def _headers(constants: RowConstants, *given: object) -> tuple[object, ...]:
    """The arguments with which a kernel checks headers. Whether they are None follows from the constants."""
    return given if constants.num_headers else (None, None, 0, None)


def _order(tensor: torch.Tensor) -> tuple[int, int]:
    """(batch rows that lie apart, elements of a token in one of them)."""
    if tensor.is_contiguous():
        return 1, tensor.numel() // len(tensor)
    length, batch_rows, hidden = tensor.shape
    assert tensor.stride() == (hidden, length * hidden, 1), f"strides {tensor.stride()} of {tensor.shape}"
    return batch_rows, hidden


def _grid(count: int, constants: RowConstants) -> Grid:
    """The grid for `count` rows. There is one program at least: it may have headers to check."""
    blocks = triton.cdiv(max(1, count), constants.block_rows)
    return blocks, triton.cdiv(constants.hidden, constants.block), constants.batch_rows
