"""Rolls of activations and their gradients. `overlap_mtp.kernels.row_reference` is the same in plain torch.

Each function binds one kernel for each tensor, whatever the documents and depths. A program handles a tile: some rows,
and up to 2 KiB of each. Copies move bits. Sums are computed in float32, or in float64 for that dtype, and are rounded
once.

Tensors are new ones in each exchange. So kernels find their addresses, and the length of the batch, in memory: the
`words`. Tensors are contiguous [S, H], [S, B, H] or [B, S, H], and begin at multiples of ALIGNMENT bytes.

    words = [S | tensors | rolls of depth 1, 2, ... || gradients of depth 1, 2, ... | sums | fingerprint of backward]

The addresses of a group are those of each tensor of the exchange. Forward writes what comes before ||, backward the
rest. A kernel is compiled for a shape of rows and a number of peers, and never again for other plans, lengths or
maps.
"""

from __future__ import annotations

from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from overlap_mtp.exchange.row_spec import ALIGNMENT, RowSpec
from overlap_mtp.exchange.rows import HEADER, NOTHING
from overlap_mtp.kernels.common import as_pointer
from overlap_mtp.kernels.launch import Arguments, Launch, in_turn

HEADER_AT = tl.constexpr(HEADER)
NOTHING_AT = tl.constexpr(NOTHING)
ALIGNED = tl.constexpr(ALIGNMENT)
STRIP_BYTES = 2048  # of a row: 16 bytes for each thread of 4 warps
TILE_BYTES = 8192


class RowConstants(NamedTuple):
    """All that is fixed for one tensor of an exchange. The kernels take it as one constant, `C`."""

    number: int  # of the tensor
    num_tensors: int
    batch_rows: int  # 1 if what a token has in all of them lies together
    hidden: int  # elements of a token in one of them
    itemsize: int
    is_bfloat16: bool
    column: int  # where the tensor begins in a row of the buffer
    elements: int  # of a row of the buffer
    num_depths: int
    block_rows: int
    block: int  # elements
    # Where groups begin in the words:
    tensors_at: int
    rolls_at: int
    gradients_at: int
    sums_at: int
    fingerprint_at: int

    @classmethod
    def of(cls, spec: RowSpec) -> list[RowConstants]:
        """Collect the constants of each tensor of an exchange, and choose its tiles."""
        count, num_depths = len(spec.names), spec.num_depths
        is_batch_first = spec.seq_dim == 1
        groups = (1, count, num_depths * count, num_depths * count, count)
        made = []
        columns = accumulate(spec.sizes, initial=0)
        for number, (shape, column) in enumerate(zip(spec.shapes, columns, strict=False)):
            batch_rows = shape[0] if is_batch_first else 1
            hidden = prod(shape) // batch_rows
            block = min(triton.next_power_of_2(hidden), STRIP_BYTES // spec.dtype.itemsize)
            block_rows = TILE_BYTES // (block * spec.dtype.itemsize)
            order = number, count, batch_rows, hidden, spec.dtype.itemsize, spec.dtype == torch.bfloat16
            sizes = column, spec.elements, num_depths
            made.append(cls(*order, *sizes, block_rows, block, *accumulate(groups)))
        return made

    @property
    def num_words(self) -> int:
        return self.fingerprint_at + 1


@triton.jit
def tile_of(count, C: tl.constexpr):
    """(rows, whether there are such, elements [1, block], which of the tile there are) of this program."""
    row = tl.program_id(0) * C.block_rows + tl.arange(0, C.block_rows)
    element = (tl.program_id(1) * C.block + tl.arange(0, C.block))[None, :]
    known = row < count
    return row, known, element, known[:, None] & (element < C.hidden)


@triton.jit
def length_of(words):
    """Rows that this rank holds of the batch, S."""
    return tl.load(words).to(tl.int32)


@triton.jit
def address_of(words, FIRST: tl.constexpr, depth, C: tl.constexpr):
    """The address of the tensor in a group, or in that of a depth (from 0)."""
    return tl.load(words + FIRST + depth * C.num_tensors + C.number)


@triton.jit
def numbers_at(address, C: tl.constexpr):
    """A tensor in its dtype."""
    if C.itemsize == 8:
        pointer = address.to(tl.pointer_type(tl.float64))
    elif C.itemsize == 4:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif C.is_bfloat16:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
    return tl.multiple_of(pointer, ALIGNED)


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
    if C.number == 0:
        if tl.program_id(1) + tl.program_id(2) == 0:
            tl.store(as_pointer(rows + row.to(tl.int64) * C.elements, 8), fingerprint, mask=is_header)


@triton.jit
def check_headers(rows, headers, fingerprint, error_flags, C: tl.constexpr, NUM_HEADERS: tl.constexpr):
    """Set error_flags[0] to 1 + a peer if the header of its message is not the fingerprint."""
    if C.number == 0 and NUM_HEADERS > 0:
        if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
            wrong = 0
            for i in tl.static_range(NUM_HEADERS):
                row = tl.load(headers + i).to(tl.int64)
                received = tl.load(as_pointer(rows + row * C.elements, 8))
                wrong = tl.where(received == fingerprint, wrong, 1 + tl.load(headers + NUM_HEADERS + i))
            if wrong > 0:
                tl.store(error_flags, wrong)


@triton.jit(do_not_specialize=["count"])
def pack_rows_kernel(words, fingerprint, packed, rows, count, C: tl.constexpr):
    row, known, element, inside = tile_of(count, C)
    token = tl.load(packed + row, mask=known, other=NOTHING_AT)
    inside = inside & (token >= 0)[:, None]
    tensor = as_pointer(address_of(words, C.tensors_at, 0, C), C.itemsize, ALIGNED)
    bits = tl.load(tensor + in_tensor(token, length_of(words), C) + element, mask=inside, other=0)
    tl.store(as_pointer(rows, C.itemsize) + in_buffer(row, C) + element, bits, mask=inside)
    write_headers(rows, row, token == HEADER_AT, tl.load(fingerprint), C)


@triton.jit
def unroll_own_rows_kernel(words, source, C: tl.constexpr):
    length = length_of(words)
    row, known, element, inside = tile_of(length, C)
    tensor = as_pointer(address_of(words, C.tensors_at, 0, C), C.itemsize, ALIGNED)
    NUM_DEPTHS: tl.constexpr = C.num_depths
    for depth in tl.static_range(NUM_DEPTHS):
        at = tl.load(source + depth * length + row, mask=known, other=NOTHING_AT)
        is_own = inside & (at < length)[:, None]
        bits = tl.load(tensor + in_tensor(at, length, C) + element, mask=is_own & (at >= 0)[:, None], other=0)
        roll = as_pointer(address_of(words, C.rolls_at, depth, C), C.itemsize, ALIGNED)
        tl.store(roll + in_tensor(row, length, C) + element, bits, mask=is_own)


@triton.jit(do_not_specialize=["count"])
def unroll_received_rows_kernel(
    words,
    fingerprint,
    in_back,
    rows,
    headers,
    error_flags,
    count,
    C: tl.constexpr,
    NUM_HEADERS: tl.constexpr,
):
    length = length_of(words)
    row, known, element, inside = tile_of(count, C)
    bits = tl.load(as_pointer(rows, C.itemsize) + in_buffer(row, C) + element, mask=inside, other=0)
    NUM_DEPTHS: tl.constexpr = C.num_depths
    for depth in tl.static_range(NUM_DEPTHS):
        to = tl.load(in_back + depth * count + row, mask=known, other=NOTHING_AT)
        roll = as_pointer(address_of(words, C.rolls_at, depth, C), C.itemsize, ALIGNED)
        tl.store(roll + in_tensor(to, length, C) + element, bits, mask=inside & (to >= 0)[:, None])
    check_headers(rows, headers, tl.load(fingerprint), error_flags, C, NUM_HEADERS)


@triton.jit
def summed(words, back, length, row, known, element, inside, count, C: tl.constexpr):
    """The sum of the gradients of all depths for this program's tile, in the precise dtype."""
    PRECISE: tl.constexpr = tl.float64 if C.itemsize == 8 else tl.float32
    BLOCK_ROWS: tl.constexpr = C.block_rows
    BLOCK: tl.constexpr = C.block
    total = tl.zeros([BLOCK_ROWS, BLOCK], PRECISE)
    NUM_DEPTHS: tl.constexpr = C.num_depths
    for depth in tl.static_range(NUM_DEPTHS):
        at = tl.load(back + depth * count + row, mask=known, other=NOTHING_AT)
        gradient = numbers_at(address_of(words, C.gradients_at, depth, C), C)
        gradient += in_tensor(at, length, C) + element
        total += tl.load(gradient, mask=inside & (at >= 0)[:, None], other=0).to(PRECISE)
    return total


@triton.jit
def sum_rows_kernel(words, own_back, C: tl.constexpr):
    length = length_of(words)
    row, known, element, inside = tile_of(length, C)
    total = summed(words, own_back, length, row, known, element, inside, length, C)
    sums = numbers_at(address_of(words, C.sums_at, 0, C), C)
    tl.store(sums + in_tensor(row, length, C) + element, total.to(sums.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def pack_sums_kernel(words, in_back, rows, count, C: tl.constexpr):
    row, known, element, inside = tile_of(count, C)
    length = length_of(words)
    total = summed(words, in_back, length, row, known, element, inside, count, C)
    is_header = tl.load(in_back + row, mask=known, other=NOTHING_AT) == HEADER_AT
    to = rows + in_buffer(row, C) + element
    tl.store(to, total.to(rows.dtype.element_ty), mask=inside & ~is_header[:, None])
    write_headers(rows, row, is_header, tl.load(words + C.fingerprint_at), C)


@triton.jit(do_not_specialize=["count", "uses"])
def add_rows_kernel(
    words,
    returned_to,
    returned,
    rows,
    headers,
    error_flags,
    count,
    uses,
    C: tl.constexpr,
    NUM_HEADERS: tl.constexpr,
):
    row, known, element, inside = tile_of(count, C)
    token = tl.load(returned_to + row, mask=known, other=NOTHING_AT)
    inside = inside & (token >= 0)[:, None]
    PRECISE: tl.constexpr = tl.float64 if C.itemsize == 8 else tl.float32
    sums = numbers_at(address_of(words, C.sums_at, 0, C), C)
    target = sums + in_tensor(token, length_of(words), C) + element
    total = tl.load(target, mask=inside, other=0).to(PRECISE)
    for use in range(uses):
        at = tl.load(returned + use * count + row, mask=known, other=NOTHING_AT)
        gradient = rows + in_buffer(at, C) + element
        total += tl.load(gradient, mask=inside & (at >= 0)[:, None], other=0).to(PRECISE)
    tl.store(target, total.to(sums.dtype.element_ty), mask=inside)
    check_headers(rows, headers, tl.load(words + C.fingerprint_at), error_flags, C, NUM_HEADERS)


class BoundRows(NamedTuple):
    """What the kernels of an exchange share. All tensors are on the device, except the error flags."""

    constants: list[RowConstants]  # of each tensor
    words: torch.Tensor  # int64 [num_words]
    fingerprint: torch.Tensor  # int64 [1]: that of forward
    length: int  # the most rows that this rank holds of a batch

    def pack_rows(self, packed: torch.Tensor, rows: torch.Tensor) -> Launch:
        """Copy rows of the tensors into a buffer.

        Args:
            packed: int32 [R]: which row goes to each row of the buffer; HEADER for the fingerprint; NOTHING leaves it
                as it is.
            rows: [R, elements of a row], of the tensors' dtype. A row is a multiple of 16 bytes.

        Returns:
            The launch. A header gets 8 bytes. The rest of it stays as it is.
        """
        return self._bind(pack_rows_kernel, (self.fingerprint, packed, rows, len(packed)), len(packed))

    def unroll_own_rows(self, source: torch.Tensor) -> Launch:
        """Write those rows of the rolls that come from this rank's own tensors, and zeros where nothing follows.

        Args:
            source: int32, [num_depths, S] and more: a row of the tensors; NOTHING for zeros; S or more leaves the row
                as it is.

        Returns:
            The launch.
        """
        return self._bind(unroll_own_rows_kernel, (source,), self.length)

    def unroll_received_rows(
        self, in_back: torch.Tensor, rows: torch.Tensor, headers: torch.Tensor, error_flags: torch.Tensor
    ) -> Launch:
        """Write those rows of the rolls that other ranks sent, and check the headers.

        Args:
            in_back: int32 [num_depths, R]: to which rolled row each row of the buffer goes; negative for none.
            rows: the buffer, [R, elements of a row].
            headers: int32 [2, n]: the rows of the buffer that must begin with the fingerprint, and the cp rank that
                each came from.
            error_flags: int32, may be pinned host memory. Its first word becomes 1 + the peer of a wrong header.

        Returns:
            The launch.
        """
        count = in_back.shape[1]
        arguments = (self.fingerprint, in_back, rows, headers, error_flags, count)
        return self._bind(unroll_received_rows_kernel, arguments, count, NUM_HEADERS=headers.shape[1])

    def sum_rows(self, own_back: torch.Tensor) -> Launch:
        """Add up the gradients of the rolls of each own row, from the smallest depth to the largest. Write the sums.

        Args:
            own_back: int32, [num_depths, S] and more: which rolled row each row went to; negative for none.

        Returns:
            The launch. The sums are written whole.
        """
        return self._bind(sum_rows_kernel, (own_back,), self.length)

    def pack_sums(self, in_back: torch.Tensor, rows: torch.Tensor) -> Launch:
        """As `sum_rows`, for the rows of a buffer.

        Args:
            in_back: int32 [num_depths, R]. The first depth has HEADER for headers.
            rows: [R, elements of a row]. What stands for tensors is written whole, except in headers.

        Returns:
            The launch.
        """
        count = in_back.shape[1]
        return self._bind(pack_sums_kernel, (in_back, rows, count), count)

    def add_rows(
        self,
        returned_to: torch.Tensor,
        returned: torch.Tensor,
        rows: torch.Tensor,
        headers: torch.Tensor,
        error_flags: torch.Tensor,
    ) -> Launch:
        """Add rows of a buffer to the sums, in the order of `returned`, and check the headers.

        Args:
            returned_to: int32 [n]: different rows of the sums; NOTHING is skipped.
            returned: int32 [most uses, n]: the rows of the buffer that are added to each; NOTHING for none.
            rows: [R, elements of a row].
            headers, error_flags: as for `unroll_received_rows`.

        Returns:
            The launch.
        """
        uses, count = returned.shape
        arguments = (returned_to, returned, rows, headers, error_flags, count, uses)
        return self._bind(add_rows_kernel, arguments, count, NUM_HEADERS=headers.shape[1])

    def _bind(self, kernel: Any, arguments: Arguments, count: int, **constants: int) -> Launch:
        """Bind a kernel for each tensor. There is one program at least: it may have headers to check."""
        launches = []
        for one in self.constants:
            blocks = triton.cdiv(max(1, count), one.block_rows)
            grid = blocks, triton.cdiv(one.hidden, one.block), one.batch_rows
            launches.append(Launch(kernel, (self.words, *arguments), grid, C=one, **constants))
        return in_turn(*launches)
