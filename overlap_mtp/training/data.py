"""Text to documents to packed or dense batches. Real input without a download: the standard library's own source.

Every rank builds the same full batch from a step number, and shards it.
"""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from overlap_mtp.layout import Kind, SequenceLayout, length_unit, pad_documents

Tokens = npt.NDArray[np.integer]
TOKEN_DTYPES = ("uint16", "uint32")
PIECE_TOKENS = 4096  # one file that marks no documents is cut into pieces of this length
SAMPLES = 1024  # documents that a fingerprint reads


class TokenError(ValueError):
    """A token id outside of the vocabulary."""


class Document(Protocol):
    """Token ids that are read when they are needed."""

    @property
    def name(self) -> str: ...

    @property
    def num_tokens(self) -> int: ...

    def read(self, begin: int, end: int) -> Tokens: ...


@dataclass(frozen=True)
class ByteDocument:
    """A file, or a piece of one, whose bytes are the tokens."""

    path: Path
    num_tokens: int
    offset: int = 0

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, begin: int, end: int) -> Tokens:
        return np.fromfile(self.path, np.uint8, end - begin, offset=self.offset + begin)


@dataclass(frozen=True)
class BinDocument:
    """A piece of a memory-mapped file of token ids."""

    ids: Tokens
    name: str

    @property
    def num_tokens(self) -> int:
        return self.ids.size

    def read(self, begin: int, end: int) -> Tokens:
        return self.ids[begin:end]


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, none of them empty."""

    documents: Sequence[Document]

    @cached_property
    def bounds(self) -> npt.NDArray[np.int64]:
        """Where each document begins in the stream of all of them, and where the stream ends."""
        return np.concatenate([[0], np.cumsum([one.num_tokens for one in self.documents])])

    @cached_property
    def fingerprint(self) -> str:
        """Of all documents' lengths in their order, and of up to PIECE_TOKENS tokens each of SAMPLES of them."""
        count = len(self.documents)
        crc = zlib.crc32(self.bounds.tobytes())
        for at in np.unique(np.linspace(0, count - 1, min(count, SAMPLES)).astype(int)):
            one = self.documents[at]
            crc = zlib.crc32(one.read(0, min(one.num_tokens, PIECE_TOKENS)).tobytes(), crc)
        return f"{count} documents, {self.bounds[-1]} tokens, CRC-32 {crc:08x}"

    def shuffled(self, seed: int) -> Corpus:
        """The same documents in a random order of that seed: neighbours in a folder are alike."""
        order = np.random.default_rng(seed).permutation(len(self.documents))
        return Corpus([self.documents[at] for at in order])

    def read(self, begin: int, length: int) -> Tokens:
        """Tokens of the stream of all documents, which starts over at its end."""
        parts, total = [], int(self.bounds[-1])
        while length > 0:
            begin %= total
            at = int(np.searchsorted(self.bounds, begin, side="right")) - 1
            first = begin - int(self.bounds[at])
            last = min(first + length, self.documents[at].num_tokens)
            parts.append(self.documents[at].read(first, last))
            begin, length = begin + last - first, length - (last - first)
        return np.concatenate(parts)


def open_corpus(data: Path | None = None, token_dtype: str = "uint16") -> Corpus:
    """The documents under a path: a folder of text files (one document a file, bytes as tokens), one text file,
    or one `.bin` of token ids, opened as a memory map. None: the Python standard library's source files. One file
    is cut into documents of PIECE_TOKENS tokens.

    Raises ValueError naming the path where it is missing, empty or not a whole number of ids.
    """
    if data is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "dist-packages", "test", "tests"}
        files = [path for path in sorted(root.rglob("*.py")) if not skip & set(path.relative_to(root).parts)]
        return Corpus([ByteDocument(path, size) for path in files if (size := path.stat().st_size)])
    if not data.exists():
        raise ValueError(
            f"{data} does not exist: give a text file, a folder of text files or a .bin of token ids"
        )
    if data.is_dir():
        files = [path for path in sorted(data.rglob("*")) if path.is_file()]
        if not files:
            raise ValueError(f"{data} holds no text: there is no file in it")
        return Corpus([ByteDocument(path, _size(path)) for path in files])
    if data.suffix != ".bin":
        size = _size(data)
        starts = range(0, size, PIECE_TOKENS)
        return Corpus([ByteDocument(data, min(PIECE_TOKENS, size - at), at) for at in starts])
    if token_dtype not in TOKEN_DTYPES:
        raise ValueError(f"token_dtype must be one of {', '.join(TOKEN_DTYPES)}, got {token_dtype!r}")
    size, width = data.stat().st_size, np.dtype(token_dtype).itemsize
    if size == 0 or size % width:
        raise ValueError(
            f"{data} must hold a whole, positive number of {token_dtype} token ids, has {size} bytes"
        )
    ids = np.memmap(data, token_dtype, mode="r")
    starts = range(0, ids.size, PIECE_TOKENS)
    return Corpus([BinDocument(ids[at : at + PIECE_TOKENS], f"{data.name}[{at}:]") for at in starts])


def _size(path: Path) -> int:
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty: give it some text, or take it away")
    return size


@dataclass(frozen=True)
class BatchStream:
    """Full-length batches of a corpus, by step. The same on every rank.

    dense (`num_documents` None): rows of the corpus's stream, documents run on into each other.
    packed: `num_documents` documents a batch, real files cut in proportion to their lengths so that they fill
    `seq_len`, padded to what the layout can cut; each with positions of its own, and no label past its end.
    `multiple_of`: what documents are padded to besides: with a multiple of 2 * cp_size of every run, runs of any
    cp_size see the same batches.
    """

    corpus: Corpus
    seq_len: int
    batch_size: int
    cp_size: int
    kind: Kind
    vocab_size: int
    num_documents: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.num_documents is None:
            return
        unit = self._unit
        if self.seq_len <= unit:
            raise ValueError(
                f"seq_len must be > {unit} for documents in a {self.kind} layout with cp_size {self.cp_size}, got "
                f"{self.seq_len}"
            )
        if self.seq_len % unit:
            raise ValueError(
                f"seq_len must be a multiple of {unit}, which documents are padded to in a {self.kind} layout with "
                f"cp_size {self.cp_size}, got {self.seq_len}"
            )
        if not 1 <= self.num_documents * unit < self.seq_len:
            raise ValueError(
                f"num_documents must be in [1, {(self.seq_len - 1) // unit}] for {self.seq_len} tokens in a "
                f"{self.kind} layout with cp_size {self.cp_size}, got {self.num_documents}"
            )
        if self.num_documents > len(self.corpus.documents):
            raise ValueError(
                f"num_documents must be at most the {len(self.corpus.documents)} documents that the data holds, "
                f"got {self.num_documents}: give more data, as a folder of files, or pack fewer"
            )

    def batch(self, step: int) -> tuple[dict[str, torch.Tensor], SequenceLayout]:
        """`input_ids`, `labels` (int64), `position_ids` (int64) and `loss_mask` (fp32), [batch_size, seq_len]
        each, and their layout. Raises TokenError naming a token id outside the vocabulary and its document."""
        return self._dense(step) if self.num_documents is None else self._packed(step, self.num_documents)

    @property
    def _unit(self) -> int:
        return lcm(length_unit(self.cp_size, self.kind), self.multiple_of)

    def _dense(self, step: int) -> tuple[dict[str, torch.Tensor], SequenceLayout]:
        layout = SequenceLayout.dense(self.seq_len, self.cp_size, self.kind)
        starts = [(step * self.batch_size + row) * self.seq_len for row in range(self.batch_size)]
        rows = np.stack([self._checked(self.corpus.read(at, self.seq_len + 1), at) for at in starts])
        tokens = torch.from_numpy(rows)
        return {
            "input_ids": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "position_ids": torch.arange(self.seq_len).repeat(self.batch_size, 1),
            "loss_mask": torch.ones(self.batch_size, self.seq_len),
        }, layout

    def _packed(self, step: int, num_documents: int) -> tuple[dict[str, torch.Tensor], SequenceLayout]:
        first = step * self.batch_size * num_documents
        count = len(self.corpus.documents)
        lap = first // count  # of the corpus: each begins one document later, so that packings differ
        chosen = [(first + lap + i) % count for i in range(self.batch_size * num_documents)]
        lengths = self._fit([self.corpus.documents[at].num_tokens for at in chosen[:num_documents]])
        streams = []
        for row in range(self.batch_size):  # rows share their bounds: the first row's documents set them
            starts = self.corpus.bounds[chosen[row * num_documents : (row + 1) * num_documents]].tolist()
            documents = [
                self._checked(self.corpus.read(at, n), at) for at, n in zip(starts, lengths, strict=True)
            ]
            stream, layout = pad_documents(
                documents, self.cp_size, self.kind, seq_len=self.seq_len, multiple_of=self.multiple_of
            )
            streams.append(stream)
        ids = torch.from_numpy(np.stack(streams))
        offsets = torch.from_numpy(layout.unshard([layout.offsets(rank) for rank in range(self.cp_size)]))
        has_label = torch.from_numpy(layout.unshard([layout.valid(rank, 1) for rank in range(self.cp_size)]))
        return {
            "input_ids": ids,
            "labels": torch.where(has_label, ids.roll(-1, dims=1), 0),
            "position_ids": offsets.repeat(self.batch_size, 1),
            "loss_mask": has_label.float().repeat(self.batch_size, 1),
        }, layout

    def _fit(self, lengths: list[int]) -> list[int]:
        """Lengths in the same proportions (at least 1) whose padded sum fits in seq_len."""
        unit = self._unit
        room = self.seq_len - len(lengths) * unit
        share = min(1.0, room / sum(lengths))
        return [max(1, int(length * share)) for length in lengths]

    def _checked(self, tokens: Tokens, at: int) -> npt.NDArray[np.int64]:
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            bad = int(np.argmax(tokens >= self.vocab_size))
            position = (at + bad) % self.corpus.bounds[-1]
            where = int(np.searchsorted(self.corpus.bounds, position, side="right")) - 1
            raise TokenError(
                f"token id {int(tokens[bad])} in {self.corpus.documents[where].name} is outside the vocabulary: "
                f"ids must be in [0, {self.vocab_size - 1}]"
            )
        return tokens.astype(np.int64)
