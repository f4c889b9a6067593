"""Who holds which token: how a sequence is cut over context-parallel (CP) ranks.

Index arithmetic in numpy only; nothing here knows torch.distributed. Every question that the rest of
the library asks about ownership is answered by `SequenceLayout.runs` (what a rank holds) and
`SequenceLayout.locate` (who holds a position).
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import lcm
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch

Kind = Literal["zigzag", "contiguous"]
KINDS: tuple[str, ...] = get_args(Kind)
IntArray = npt.NDArray[np.int64]
ArrayOrTensor = TypeVar("ArrayOrTensor", torch.Tensor, npt.NDArray[Any])


@dataclass(frozen=True)
class Runs:
    """The stretches of consecutive positions of one document that a rank holds, in the order of its slots.

    All arrays are [num_runs]: `document`, the global positions `begin` <= p < `end` (equal where a document
    is empty), and the local `slot` of `begin`.
    """

    document: IntArray
    begin: IntArray
    end: IntArray
    slot: IntArray


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """A sequence of `seq_len` tokens, its documents, and how `cp_size` ranks share it.

    Make one with `SequenceLayout.dense` or `SequenceLayout.packed`.

    - zigzag (also called head-tail load balancing): each document is cut into 2 * cp_size chunks of
      equal length and rank r holds chunks r and 2 * cp_size - 1 - r of it; documents stay in order.
    - contiguous: rank r holds the r-th of cp_size equal pieces of the whole stream.
    """

    cu_seqlens: IntArray  # [num_documents + 1], of the padded stream
    valid_lengths: IntArray  # [num_documents], tokens of each document that are not padding
    cp_size: int
    kind: Kind
    is_packed: bool
    _positions: dict[int, IntArray] = field(default_factory=dict, repr=False)

    @classmethod
    def dense(cls, seq_len: int, cp_size: int, kind: Kind = "zigzag") -> SequenceLayout:
        """One document of `seq_len` tokens in each row of the batch.

        Raises ValueError where `seq_len` cannot be cut: it must be a multiple of 2 * cp_size (zigzag) or
        cp_size (contiguous).
        """
        _check_cp(cp_size, kind)
        unit, seq_len = length_unit(cp_size, kind), operator.index(seq_len)
        if seq_len < 1 or seq_len % unit:
            raise ValueError(
                f"seq_len must be a positive multiple of {unit} for a {kind} layout with cp_size {cp_size}, "
                f"got {seq_len}: the next legal length is {max(unit, -(-seq_len // unit) * unit)}; "
                "pad_documents(...) pads documents to legal lengths"
            )
        return cls(np.array([0, seq_len]), np.array([seq_len]), cp_size, kind, is_packed=False)

    @classmethod
    def packed(
        cls,
        cu_seqlens: Sequence[int] | npt.NDArray[Any] | torch.Tensor,
        cp_size: int,
        kind: Kind = "zigzag",
        valid_lengths: Sequence[int] | npt.NDArray[Any] | torch.Tensor | None = None,
    ) -> SequenceLayout:
        """Documents laid end to end; the same ones in every row of the batch.

        `cu_seqlens` [num_documents + 1] holds the bounds of the documents in the padded stream,
        `valid_lengths` [num_documents] how many tokens of each are not padding (default: all of them).
        Keep both on the host: a tensor on a GPU is copied, which waits for the device.

        Raises ValueError where `cu_seqlens` does not start at 0, decreases, or cannot be cut: zigzag needs
        every document's padded length to be a multiple of 2 * cp_size, contiguous the stream's length to be
        one of cp_size.
        """
        _check_cp(cp_size, kind)
        bounds = _host_int64(cu_seqlens, "cu_seqlens")
        if bounds.size < 2 or bounds[0] != 0:
            raise ValueError(
                "cu_seqlens must start at 0 and hold at least one document (two entries), "
                f"got {_brief(bounds)}"
            )
        lengths = np.diff(bounds)
        if (lengths < 0).any():
            at = int(np.flatnonzero(lengths < 0)[0])
            raise ValueError(
                f"cu_seqlens must not decrease, got {bounds[at]} then {bounds[at + 1]} at entries {at} and "
                f"{at + 1}: pass the running sum of the padded document lengths"
            )
        unit = length_unit(cp_size, kind)
        if kind == "zigzag" and (lengths % unit).any():
            at = int(np.flatnonzero(lengths % unit)[0])
            raise ValueError(
                f"document {at} has padded length {lengths[at]}, which a zigzag layout with cp_size {cp_size} "
                f"cannot cut: it must be a multiple of {unit}, the next is {-(-lengths[at] // unit) * unit}; "
                "pad_documents(...) pads documents to legal lengths"
            )
        if bounds[-1] < 1 or bounds[-1] % unit:
            raise ValueError(
                f"the stream's length (the last entry of cu_seqlens) must be a positive multiple of {unit} for "
                f"a {kind} layout with cp_size {cp_size}, got {bounds[-1]}: the next legal length is "
                f"{max(unit, -(-bounds[-1] // unit) * unit)}; pad_documents(...) pads documents to legal lengths"
            )
        valid = lengths if valid_lengths is None else _host_int64(valid_lengths, "valid_lengths")
        if valid.shape != lengths.shape:
            raise ValueError(
                f"valid_lengths must have one entry per document, got {valid.size} for {lengths.size} documents"
            )
        if ((valid < 0) | (valid > lengths)).any():
            at = int(np.flatnonzero((valid < 0) | (valid > lengths))[0])
            raise ValueError(
                f"valid_lengths[{at}] must be in [0, {lengths[at]}], the padded length of that document, "
                f"got {valid[at]}"
            )
        return cls(bounds, valid, cp_size, kind, is_packed=True)

    @property
    def seq_len(self) -> int:
        """Tokens of the whole (padded) sequence."""
        return int(self.cu_seqlens[-1])

    @property
    def local_len(self) -> int:
        """Tokens that each rank holds."""
        return self.seq_len // self.cp_size

    @property
    def num_documents(self) -> int:
        return self.valid_lengths.size

    @property
    def num_chunks(self) -> int:
        """The equal chunks that a unit is cut into: a document (zigzag), or the whole stream (contiguous)."""
        return length_unit(self.cp_size, self.kind)

    def held_chunks(self, cp_rank: int) -> tuple[int, ...]:
        """The chunks of each unit that a rank holds, in the order of its slots."""
        return (cp_rank, self.num_chunks - 1 - cp_rank) if self.kind == "zigzag" else (cp_rank,)

    @cached_property
    def valid_ends(self) -> IntArray:
        """Global position after each document's last valid token, [num_documents]."""
        return self.cu_seqlens[:-1] + self.valid_lengths

    @cached_property
    def key(self) -> bytes:
        """16 bytes that two layouts share if and only if they cut alike (up to a hash collision)."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{self.kind},{self.cp_size},{self.is_packed},".encode())
        digest.update(self.cu_seqlens.tobytes())
        digest.update(self.valid_lengths.tobytes())
        return digest.digest()

    def runs(self, cp_rank: int) -> Runs:
        """What `cp_rank` holds: two runs a document (zigzag), one for each that it touches (contiguous)."""
        if self.kind == "contiguous":
            first, last = cp_rank * self.local_len, (cp_rank + 1) * self.local_len
            begin = np.maximum(self.cu_seqlens[:-1], first)
            end = np.minimum(self.cu_seqlens[1:], last)
            document = np.flatnonzero(begin < end)
            return Runs(document, begin[document], end[document], begin[document] - first)
        start = self.cu_seqlens[:-1, None]  # [num_documents, 1]
        size = np.diff(self.cu_seqlens)[:, None] // (2 * self.cp_size)  # of a chunk
        begin = start + size * np.array([cp_rank, 2 * self.cp_size - 1 - cp_rank])  # [num_documents, 2]
        slot = start // self.cp_size + size * np.array([0, 1])
        document = np.arange(self.num_documents).repeat(2)
        return Runs(document, begin.ravel(), (begin + size).ravel(), slot.ravel())

    def locate(self, position: IntArray, document: IntArray) -> tuple[IntArray, IntArray]:
        """(cp_rank, local slot) of global positions, given the document that each of them lies in."""
        if self.kind == "contiguous":
            return position // self.local_len, position % self.local_len
        start = self.cu_seqlens[document]
        size = np.maximum((self.cu_seqlens[document + 1] - start) // (2 * self.cp_size), 1)
        chunk, within = np.divmod(position - start, size)
        mirrored = 2 * self.cp_size - 1 - chunk
        rank = np.minimum(chunk, mirrored)
        return rank, start // self.cp_size + np.where(chunk > mirrored, size, 0) + within

    def positions(self, cp_rank: int) -> IntArray:
        """Global position of each local slot, [local_len]."""
        self.check_rank(cp_rank)
        if cp_rank not in self._positions:
            runs = self.runs(cp_rank)
            shift = np.repeat(runs.begin - runs.slot, runs.end - runs.begin)
            self._positions[cp_rank] = np.arange(self.local_len) + shift
        return self._positions[cp_rank]

    def offsets(self, cp_rank: int) -> IntArray:
        """Position within its document of each local slot, [local_len]."""
        runs = self.runs(cp_rank)
        starts = np.repeat(self.cu_seqlens[runs.document], runs.end - runs.begin)
        return self.positions(cp_rank) - starts

    def valid(self, cp_rank: int, depth: int = 0) -> npt.NDArray[np.bool_]:
        """Whether the token `depth` ahead of each local slot is a valid one of its document, [local_len]."""
        runs = self.runs(cp_rank)
        ends = np.repeat(self.valid_ends[runs.document], runs.end - runs.begin)
        return self.positions(cp_rank) + depth < ends

    def shard(self, tensor: ArrayOrTensor, cp_rank: int, dim: int = -1) -> ArrayOrTensor:
        """The part of a full-length tensor or array that `cp_rank` holds: `dim` shrinks to `local_len`."""
        if tensor.shape[dim] != self.seq_len:
            raise ValueError(
                f"cannot shard: dimension {dim} must have the layout's length {self.seq_len} "
                f"(the end of cu_seqlens), got {tensor.shape[dim]}"
            )
        return _take(tensor, self.positions(cp_rank), dim)

    def unshard(self, shards: Sequence[ArrayOrTensor], dim: int = -1) -> ArrayOrTensor:
        """The full-length tensor or array from the shards of ranks 0 .. cp_size - 1: undoes `shard`."""
        if len(shards) != self.cp_size:
            raise ValueError(f"unshard needs one shard for each of {self.cp_size} ranks, got {len(shards)}")
        for rank, one in enumerate(shards):
            if one.shape[dim] != self.local_len:
                raise ValueError(
                    f"cannot unshard: dimension {dim} of shard {rank} must have length {self.local_len}, "
                    f"got {one.shape[dim]}"
                )
        return _take(_concatenate(shards, dim), self.gather_index, dim)

    @cached_property
    def gather_index(self) -> IntArray:
        """Where each global position stands in the shards laid end to end, [seq_len]."""
        index = np.empty(self.seq_len, np.int64)
        index[np.concatenate([self.positions(rank) for rank in range(self.cp_size)])] = np.arange(
            self.seq_len
        )
        return index

    def check_rank(self, cp_rank: int) -> None:
        if not 0 <= cp_rank < self.cp_size:
            raise ValueError(f"cp_rank must be in [0, {self.cp_size - 1}], got {cp_rank}")


def length_unit(cp_size: int, kind: Kind) -> int:
    """Legal lengths are multiples of this: of a document (zigzag) or of the stream (contiguous)."""
    return 2 * cp_size if kind == "zigzag" else cp_size


def pad_documents(
    documents: Sequence[ArrayOrTensor],
    cp_size: int,
    kind: Kind = "zigzag",
    pad_value: int = 0,
    seq_len: int | None = None,
    multiple_of: int = 1,
) -> tuple[ArrayOrTensor, SequenceLayout]:
    """Lays documents of any lengths end to end, padded so that `cp_size` ranks can share them.

    `documents` are 1-D tensors or arrays of one dtype (empty ones are legal). Returns the padded stream
    [S] and its packed layout, whose `valid_lengths` are the documents' own lengths. `seq_len`, where
    given, is the length S to reach: what is missing becomes padding of the last document. `multiple_of`: what lengths
    are padded to besides, so that streams for several cp_size can be made alike.
    """
    _check_cp(cp_size, kind)
    if not documents:
        raise ValueError("pad_documents needs at least one document, got none")
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be >= 1, got {multiple_of}")
    for at, one in enumerate(documents):
        if one.ndim != 1:
            raise ValueError(f"documents must be 1-D, document {at} has shape {tuple(one.shape)}")
    example = next((one for one in documents if one.shape[0]), documents[0])
    for at, one in enumerate(documents):
        if one.shape[0] and one.dtype != example.dtype:
            raise ValueError(
                f"documents must be of one dtype, got {example.dtype} and, in document {at}, {one.dtype}"
            )
    unit = lcm(length_unit(cp_size, kind), multiple_of)
    valid = np.array([one.shape[0] for one in documents])
    own = unit if kind == "zigzag" else multiple_of
    lengths = -(-valid // own) * own
    least = max(unit, -(-int(lengths.sum()) // unit) * unit)
    if seq_len is not None and (seq_len < least or seq_len % unit):
        raise ValueError(
            f"seq_len must be a multiple of {unit} and at least {least} for these documents, got {seq_len}"
        )
    lengths[-1] += (seq_len or least) - int(lengths.sum())
    layout = SequenceLayout.packed(np.concatenate([[0], np.cumsum(lengths)]), cp_size, kind, valid)
    stream = _full_like(example, layout.seq_len, pad_value)
    for one, start, length in zip(documents, layout.cu_seqlens, valid, strict=False):
        stream[start : start + length] = one
    return stream, layout


def _check_cp(cp_size: int, kind: str) -> None:
    if cp_size < 1:
        raise ValueError(f"cp_size must be >= 1, got {cp_size}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def _host_int64(values: Sequence[int] | npt.NDArray[Any] | torch.Tensor, name: str) -> IntArray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be 1-D and of an integer type, got shape {array.shape}, {array.dtype}")
    return array.astype(np.int64)


def _brief(array: IntArray) -> str:
    return np.array2string(array, threshold=8, edgeitems=3)


def _take(tensor: ArrayOrTensor, index: IntArray, dim: int) -> ArrayOrTensor:
    if isinstance(tensor, torch.Tensor):
        return tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))
    return np.take(tensor, index, axis=dim)


def _concatenate(parts: Sequence[ArrayOrTensor], dim: int) -> ArrayOrTensor:
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(list(parts), dim)
    return np.concatenate(parts, axis=dim)


def _full_like(example: ArrayOrTensor, length: int, value: int) -> ArrayOrTensor:
    if isinstance(example, torch.Tensor):
        return example.new_full((length,), value)
    return np.full(length, value, example.dtype)
