"""Who holds which token: how a sequence is cut over context-parallel (CP) ranks.

This is index arithmetic in numpy; nothing here knows torch.distributed. Two methods answer every question about
ownership: `SequenceLayout.runs` (what a rank holds) and `SequenceLayout.locate` (who holds a position).
"""

from __future__ import annotations

import hashlib
import operator
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch

Kind = Literal["zigzag", "contiguous", "zigzag_stream"]
KINDS: tuple[str, ...] = get_args(Kind)
TAIL = -1  # in place of the valid length of a tail
IntArray = npt.NDArray[np.int64]
ArrayOrTensor = TypeVar("ArrayOrTensor", torch.Tensor, npt.NDArray[Any])


@dataclass(frozen=True)
class Runs:
    """The runs of consecutive positions that a rank holds, in local order. A run lies in one document.

    All arrays are [num_runs]. A run covers the global positions `begin` <= p < `end` of `document` (none if the
    document is empty). `local_index` is where `begin` lies on the rank.
    """

    document: IntArray
    begin: IntArray
    end: IntArray
    local_index: IntArray


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """A sequence of `seq_len` tokens, its documents, and how `cp_size` ranks share it.

    Make one with `SequenceLayout.dense` or `SequenceLayout.packed`.

    - zigzag (also called head-tail load balancing): each document is cut into 2 * cp_size chunks of
      equal length and rank r holds chunks r and 2 * cp_size - 1 - r of it; documents stay in order.
    - zigzag_stream: the same cut, of the whole stream in place of each document. Documents may have any length.
    - contiguous: rank r holds the r-th of cp_size equal pieces of the whole stream.

    A packed stream may have a tail after its last document. Its tokens belong to no document: a roll leaves them as
    they are, as Megatron-LM does. It counts as a last document, of valid length TAIL.
    """

    cu_seqlens: IntArray  # [num_documents + 1], of the padded stream
    valid_lengths: IntArray  # [num_documents], tokens of each document that are not padding; TAIL
    cp_size: int
    kind: Kind
    is_packed: bool
    batch: int = 0  # the checksum of the name that `of_batch` was given; it is not in `key`
    _positions: dict[int, IntArray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # What exchanges need of a layout is found where it is made. In the first exchange's `start` it would take 50 µs
        # on cold caches.
        _ = self.checksum

    @classmethod
    def dense(cls, seq_len: int, cp_size: int, kind: Kind = "zigzag") -> SequenceLayout:
        """Lay out one document of `seq_len` tokens in each row of the batch.

        Args:
            seq_len: tokens of the whole sequence: a multiple of 2 * cp_size (both zigzags) or of cp_size
                (contiguous).
            cp_size: how many ranks share the sequence.
            kind: "zigzag", "contiguous" or "zigzag_stream", which is "zigzag" here.

        Returns:
            The layout.

        Raises:
            ValueError: if `seq_len` cannot be cut, or a value is out of range.
        """
        check_cp(cp_size, kind)
        _check_length("seq_len", seq_len := operator.index(seq_len), cp_size, kind)
        return cls(np.array([0, seq_len]), np.array([seq_len]), cp_size, kind, is_packed=False)

    @classmethod
    def packed(
        cls,
        cu_seqlens: Sequence[int] | npt.NDArray[Any] | torch.Tensor,
        cp_size: int,
        kind: Kind = "zigzag",
        valid_lengths: Sequence[int] | npt.NDArray[Any] | torch.Tensor | None = None,
        seq_len: int | None = None,
    ) -> SequenceLayout:
        """Lay out documents end to end, the same ones in every row of the batch.

        Keep the arguments on the host: a tensor on a GPU is copied, which waits for the device. If the bounds are on a
        GPU, use `DeviceLayout`.

        Args:
            cu_seqlens: integers [num_documents + 1], the bounds of the documents in the padded stream. It starts
                at 0, and may repeat its last entry to keep one size. Zigzag needs each document's padded length to be
                a multiple of 2 * cp_size; zigzag_stream and contiguous need the stream's length to be a multiple of
                2 * cp_size and cp_size.
            cp_size: how many ranks share the stream.
            kind: "zigzag", "contiguous" or "zigzag_stream".
            valid_lengths: integers [num_documents], how many tokens of each document are not padding. Default:
                all of them.
            seq_len: the stream's length, if a tail follows the last document. Zigzag needs a tail of a multiple of
                cp_size tokens; each rank holds an equal piece of it, after its documents.

        Returns:
            The layout.

        Raises:
            ValueError: if the bounds decrease, do not start at 0 or cannot be cut, or a length is out of range.
        """
        check_cp(cp_size, kind)
        bounds = _host_int64(cu_seqlens, "cu_seqlens")
        if bounds.size < 2 or bounds[0] != 0:
            raise ValueError(
                "cu_seqlens must start at 0 and hold at least one document (two entries), "
                f"got {_brief(bounds)}"
            )
        if (bounds[1:] < bounds[:-1]).any():  # their differences may overflow
            at = int(np.flatnonzero(bounds[1:] < bounds[:-1])[0])
            raise ValueError(
                f"cu_seqlens must not decrease, got {bounds[at]} then {bounds[at + 1]} at entries {at} and "
                f"{at + 1}: pass the running sum of the padded document lengths"
            )
        lengths, multiple = np.diff(bounds), length_unit(cp_size, kind)
        if kind == "zigzag" and (lengths % multiple).any():
            at = int(np.flatnonzero(lengths % multiple)[0])
            _check_length(f"the padded length of document {at}", int(lengths[at]), cp_size, kind, least=0)
        seq_len = int(bounds[-1]) if seq_len is None else operator.index(seq_len)
        check_stream(seq_len, int(bounds[-1]), cp_size, kind)
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
        if seq_len > bounds[-1]:
            used = int(bounds.searchsorted(bounds[-1]))  # empty documents at the end are left out
            bounds, valid = np.append(bounds[: used + 1], seq_len), np.append(valid[:used], TAIL)
        return cls(bounds, valid, cp_size, kind, is_packed=True)

    def of_batch(self, name: str) -> SequenceLayout:
        """Name the batch that this layout is for, so that exchanges can tell it from other batches.

        Ranks whose loaders disagree, for example because a sampler gave each rank another sample, exchange tokens that
        do not belong together, and nothing in the tokens shows it. With names, they fail instead. This costs nothing,
        as messages carry a fingerprint anyway.

        Args:
            name: the same on all ranks of the cp group if, and only if, they hold parts of the same full batch: for
                example its sample numbers, or a hash of all its tokens.

        Returns:
            The layout with this name; equal to the one without it.

        Raises:
            TypeError: if `name` is not a string.
        """
        return replace(self, batch=batch_checksum(name))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SequenceLayout) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

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

    @cached_property
    def num_used_documents(self) -> int:
        """Documents up to the last one that has a length. A `cu_seqlens` of static size repeats its last entry."""
        bounds = self.cu_seqlens
        return self.num_documents if bounds[-2] != bounds[-1] else int(bounds.searchsorted(bounds[-1]))

    @property
    def by_document(self) -> bool:
        """Whether each document is cut into chunks; otherwise the whole stream is."""
        return self.kind == "zigzag"

    @property
    def tail_len(self) -> int:
        """Tokens of the whole stream that belong to no document."""
        return int(self.cu_seqlens[-1] - self.cu_seqlens[-2]) if self.valid_lengths[-1] == TAIL else 0

    @property
    def num_chunks(self) -> int:
        """How many equal chunks a document (zigzag) or the whole stream (others) is cut into."""
        return length_unit(self.cp_size, self.kind)

    def held_chunks(self, cp_rank: int) -> tuple[int, ...]:
        """The chunks that a rank holds of each document (zigzag) or of the stream (others), in local order."""
        return (cp_rank,) if self.kind == "contiguous" else (cp_rank, self.num_chunks - 1 - cp_rank)

    @cached_property
    def valid_ends(self) -> IntArray:
        """The global position after each document's last valid token, [num_documents]. TAIL for a tail."""
        ends = self.cu_seqlens[:-1] + self.valid_lengths
        return np.where(self.valid_lengths == TAIL, TAIL, ends) if self.tail_len else ends

    @cached_property
    def checksum(self) -> int:
        """Of the bounds and valid ends of the documents that are used, 32 bits. Exchanges compare it."""
        documents = self.num_used_documents
        bounds, ends = self.cu_seqlens[: documents + 1], self.valid_ends[:documents]
        return zlib.crc32(ends.tobytes(), zlib.crc32(bounds.tobytes()))

    @cached_property
    def key(self) -> bytes:
        """16 bytes that two layouts share if they cut the same way, and only then (up to a hash collision)."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{self.kind},{self.cp_size},{self.is_packed},".encode())
        digest.update(self.cu_seqlens.tobytes())
        digest.update(self.valid_lengths.tobytes())
        return digest.digest()

    def runs(self, cp_rank: int) -> Runs:
        """List the runs of tokens that a rank holds.

        Args:
            cp_rank: of the ranks that share the sequence.

        Returns:
            Two for each document (zigzag), or one for each document and chunk that meet (others). A tail is one.
        """
        cu = self.cu_seqlens
        if not self.by_document:
            chunk_len = self.seq_len // self.num_chunks
            first = np.array(self.held_chunks(cp_rank))[:, None] * chunk_len
            begin, end = np.maximum(cu[:-1], first), np.minimum(cu[1:], first + chunk_len)
            held, document = np.nonzero(begin < end)
            begin, end = begin[held, document], end[held, document]
            return Runs(document, begin, end, begin - first[held, 0] + held * chunk_len)
        tail = self.tail_len // self.cp_size
        num_documents = self.num_documents - bool(tail)
        start = cu[:num_documents, None]  # [num_documents, 1]
        size = np.diff(cu)[:num_documents, None] // (2 * self.cp_size)  # of a chunk
        begin = start + size * np.array(self.held_chunks(cp_rank))  # [num_documents, 2]
        local_index = start // self.cp_size + size * np.array([0, 1])
        document = np.arange(num_documents).repeat(2)
        runs = [document, begin.ravel(), (begin + size).ravel(), local_index.ravel()]
        if tail:
            begin_tail = int(cu[-2]) + cp_rank * tail
            last = (num_documents, begin_tail, begin_tail + tail, self.local_len - tail)
            runs = [np.append(array, value) for array, value in zip(runs, last, strict=True)]
        return Runs(*runs)

    def locate(self, position: IntArray, document: IntArray) -> tuple[IntArray, IntArray]:
        """Find which rank holds tokens, and where.

        Args:
            position: int64 [n]: global positions.
            document: int64 [n]: the document of each, which is not a tail.

        Returns:
            (cp_rank, local_index), int64 [n] each.
        """
        start: IntArray | int = 0
        size: IntArray | int = self.seq_len // self.num_chunks
        if self.by_document:
            start = self.cu_seqlens[document]
            size = np.maximum((self.cu_seqlens[document + 1] - start) // self.num_chunks, 1)
        chunk, within = np.divmod(position - start, size)
        if self.kind == "contiguous":
            return chunk, within
        mirrored = self.num_chunks - 1 - chunk
        rank = np.minimum(chunk, mirrored)
        return rank, start // self.cp_size + np.where(chunk > mirrored, size, 0) + within

    def positions(self, cp_rank: int) -> IntArray:
        """Find where in the whole sequence each local token is.

        Args:
            cp_rank: of the ranks that share the sequence.

        Returns:
            int64 [local_len]: global positions.

        Raises:
            ValueError: if there is no such rank.
        """
        return self._known_positions(cp_rank).copy()

    def _known_positions(self, cp_rank: int) -> IntArray:
        """`positions`, not to be written to."""
        self.check_rank(cp_rank)
        if cp_rank not in self._positions:
            runs = self.runs(cp_rank)
            shift = np.repeat(runs.begin - runs.local_index, runs.end - runs.begin)
            self._positions[cp_rank] = np.arange(self.local_len) + shift
        return self._positions[cp_rank]

    def offsets(self, cp_rank: int) -> IntArray:
        """Find where in its document each local token is.

        Args:
            cp_rank: of the ranks that share the sequence.

        Returns:
            int64 [local_len]: positions, which begin with 0 in each document.

        Raises:
            ValueError: if there is no such rank.
        """
        runs = self.runs(cp_rank)
        starts = np.repeat(self.cu_seqlens[runs.document], runs.end - runs.begin)
        return self._known_positions(cp_rank) - starts

    def valid(self, cp_rank: int, depth: int = 0) -> npt.NDArray[np.bool_]:
        """Find out whether the token `depth` after each local token is a valid token of the same document.

        Args:
            cp_rank: of the ranks that share the sequence.
            depth: in tokens; 0 asks for the local token itself.

        Returns:
            bool [local_len]. Tokens of a tail are not valid.

        Raises:
            ValueError: if there is no such rank.
        """
        runs = self.runs(cp_rank)
        ends = np.repeat(self.valid_ends[runs.document], runs.end - runs.begin)
        return self._known_positions(cp_rank) + depth < ends

    def in_tail(self, cp_rank: int) -> npt.NDArray[np.bool_]:
        """Find out whether each local token belongs to the tail.

        Args:
            cp_rank: of the ranks that share the sequence.

        Returns:
            bool [local_len].

        Raises:
            ValueError: if there is no such rank.
        """
        return self._known_positions(cp_rank) >= self.seq_len - self.tail_len

    def shard(self, tensor: ArrayOrTensor, cp_rank: int, dim: int = -1) -> ArrayOrTensor:
        """Take the part of a full-length tensor or array that a rank holds.

        Args:
            tensor: torch tensor or numpy array; dimension `dim` has length `seq_len`.
            cp_rank: the rank.
            dim: the sequence dimension.

        Returns:
            A copy in which `dim` has length `local_len`.

        Raises:
            ValueError: if `dim` has another length, or there is no such rank.
        """
        if tensor.shape[dim] != self.seq_len:
            raise ValueError(
                f"cannot shard: dimension {dim} must have the layout's length {self.seq_len} "
                f"(the end of cu_seqlens), got {tensor.shape[dim]}"
            )
        return _take(tensor, self._known_positions(cp_rank), dim)

    def unshard(self, shards: Sequence[ArrayOrTensor], dim: int = -1) -> ArrayOrTensor:
        """Undo `shard`.

        Args:
            shards: one of each rank, in rank order; dimension `dim` has length `local_len`.
            dim: the sequence dimension.

        Returns:
            The full-length tensor or array.

        Raises:
            ValueError: if a shard is missing or has another length.
        """
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
        """The index of each global position in the shards laid end to end, [seq_len]."""
        index = np.empty(self.seq_len, np.int64)
        index[np.concatenate([self._known_positions(rank) for rank in range(self.cp_size)])] = np.arange(
            self.seq_len
        )
        return index

    def check_rank(self, cp_rank: int) -> None:
        if not 0 <= cp_rank < self.cp_size:
            raise ValueError(f"cp_rank must be in [0, {self.cp_size - 1}], got {cp_rank}")


def batch_checksum(name: str) -> int:
    """The checksum of a batch's name (`SequenceLayout.of_batch`), 32 bits."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a batch must be a string, got {type(name).__name__}: pass str(...)")
    return zlib.crc32(name.encode())


def length_unit(cp_size: int, kind: Kind) -> int:
    """What a document's length (zigzag) or the stream's length (others) must be a multiple of."""
    return cp_size if kind == "contiguous" else 2 * cp_size


def check_cp(cp_size: int, kind: str) -> None:
    if operator.index(cp_size) < 1:
        raise ValueError(f"cp_size must be >= 1, got {cp_size}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def _check_length(what: str, length: int, cp_size: int, kind: Kind, least: int = 1) -> None:
    multiple = length_unit(cp_size, kind)
    if length < least or length % multiple:
        raise ValueError(
            f"{what} must be a {'positive ' * least}multiple of {multiple} for a {kind} layout with cp_size {cp_size}, "
            f"got {length}: the next legal length is {max(multiple, -(-length // multiple) * multiple)}; "
            "pad_documents(...) pads documents to legal lengths"
        )


def check_stream(seq_len: int, covered: int, cp_size: int, kind: Kind) -> None:
    """Check the length of a stream whose documents end at `covered`."""
    check_cp(cp_size, kind)
    if seq_len < covered:
        raise ValueError(f"seq_len must be at least the last entry of cu_seqlens, {covered}, got {seq_len}")
    if seq_len == covered:
        _check_length("the stream's length (the last entry of cu_seqlens)", seq_len, cp_size, kind)
    elif kind != "zigzag":
        _check_length("the stream's length seq_len", seq_len, cp_size, kind)
    elif seq_len % cp_size:
        raise ValueError(f"seq_len must be a multiple of cp_size {cp_size}, got {seq_len}")


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
