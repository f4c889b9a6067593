"""Text to documents to packed or dense batches. The default text is the source of Python's standard library.

Every rank builds the same full batch from a step number, and takes its shard.
"""

from __future__ import annotations

import os
import sysconfig
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from overlap_mtp.layout import Kind, SequenceLayout, length_unit, pad_documents

Tokens = npt.NDArray[np.integer]
Batch = tuple[dict[str, torch.Tensor], SequenceLayout]
TOKEN_DTYPES = ("uint16", "uint32")  # of a .bin
PIECE_TOKENS = 4096  # a single file is cut into documents of this length
SAMPLES = 1024  # documents that a fingerprint reads


class TokenError(ValueError):
    """A token id outside of the vocabulary."""


@dataclass(frozen=True)
class Document:
    """A file of token ids, or a part of one, that is read when it is needed. The tokens of text are its bytes."""

    path: Path
    num_tokens: int
    offset: int = 0  # tokens of the file before this document
    dtype: str = "uint8"

    def read(self, begin: int, end: int) -> Tokens:
        """Return the tokens in [begin, end)."""
        offset = (self.offset + begin) * np.dtype(self.dtype).itemsize
        return np.fromfile(self.path, self.dtype, end - begin, offset=offset)


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, none of them empty. Together they are one stream of tokens."""

    documents: Sequence[Document]

    @cached_property
    def bounds(self) -> npt.NDArray[np.int64]:
        """The position of each document in the stream, and the stream's length."""
        return np.concatenate([[0], np.cumsum([one.num_tokens for one in self.documents])])

    @cached_property
    def fingerprint(self) -> str:
        """Digest the lengths of all documents in order, and PIECE_TOKENS tokens of each of SAMPLES documents."""
        count = len(self.documents)
        crc = zlib.crc32(self.bounds.tobytes())
        for at in np.unique(np.linspace(0, count - 1, min(count, SAMPLES)).astype(int)):
            one = self.documents[at]
            crc = zlib.crc32(one.read(0, min(one.num_tokens, PIECE_TOKENS)).tobytes(), crc)
        return f"{count} documents, {self.bounds[-1]} tokens, CRC-32 {crc:08x}"

    def shuffled(self, seed: int) -> Corpus:
        """Return the same documents in random order, because neighbours in a folder resemble each other."""
        order = np.random.default_rng(seed).permutation(len(self.documents))
        return Corpus([self.documents[at] for at in order])

    def document_at(self, position: int) -> int:
        """Return the index of the document that holds a position of the stream."""
        return int(np.searchsorted(self.bounds, position, side="right")) - 1

    def read(self, begin: int, length: int) -> Tokens:
        """Return tokens of the stream, which starts again at its end."""
        parts, total = [], int(self.bounds[-1])
        while length > 0:
            begin %= total
            at = self.document_at(begin)
            first = begin - int(self.bounds[at])
            last = min(first + length, self.documents[at].num_tokens)
            parts.append(self.documents[at].read(first, last))
            begin, length = begin + last - first, length - (last - first)
        return np.concatenate(parts)


def open_corpus(data: Path | None = None, token_dtype: str = "uint16") -> Corpus:
    """Find the documents under a path.

    Args:
        data: a folder (each file in it, at any depth, is a document; its bytes are the tokens), a text file or a
            `.bin` of token ids (both are cut into documents of PIECE_TOKENS tokens). Default: the source files of
            Python's standard library.
        token_dtype: of a `.bin`, one of TOKEN_DTYPES.

    Raises:
        ValueError: naming the path, if it is missing, empty or not a whole number of ids.
    """
    if data is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = set(subfolders) - {"site-packages", "dist-packages", "test", "tests"}
            files += [Path(folder, name) for name in names if name.endswith(".py")]
        return Corpus([Document(path, size) for path in sorted(files) if (size := path.stat().st_size)])
    if not data.exists():
        raise ValueError(
            f"{data} does not exist: give a text file, a folder of text files or a .bin of token ids"
        )
    if data.is_dir():
        files = [path for path in sorted(data.rglob("*")) if path.is_file()]
        if not files:
            raise ValueError(f"{data} holds no text: put files into it, or give another folder")
        return Corpus([Document(path, _num_tokens(path, "uint8")) for path in files])
    dtype = token_dtype if data.suffix == ".bin" else "uint8"
    if dtype not in ("uint8", *TOKEN_DTYPES):
        raise ValueError(f"token_dtype must be one of {', '.join(TOKEN_DTYPES)}, got {dtype!r}")
    size = _num_tokens(data, dtype)
    starts = range(0, size, PIECE_TOKENS)
    return Corpus([Document(data, min(PIECE_TOKENS, size - at), at, dtype) for at in starts])


def _num_tokens(path: Path, dtype: str) -> int:
    num_tokens, rest = divmod(path.stat().st_size, np.dtype(dtype).itemsize)
    if rest:
        raise ValueError(
            f"{path} must hold a whole number of {dtype} token ids, has {path.stat().st_size} bytes: check token_dtype"
        )
    if num_tokens == 0:
        raise ValueError(f"{path} is empty: add text to it, or remove it")
    return num_tokens


@dataclass(frozen=True)
class BatchStream:
    """Full-length batches of a corpus, by step; the same on every rank.

    Dense (`num_documents` is None): rows of the corpus's stream; a document begins right after the one before.
    Packed: `num_documents` documents in each batch. Their beginnings, in proportion to their lengths, fill `seq_len`.
    Each document is padded to a multiple of the layout's unit, has its own positions, and has no label past its end.
    """

    corpus: Corpus
    seq_len: int
    batch_size: int
    cp_size: int
    kind: Kind
    vocab_size: int
    num_documents: int | None = None
    multiple_of: int = 1  # pads documents further: they are then the same at all cp_sizes that divide it

    def __post_init__(self) -> None:
        if self.num_documents is None:
            return
        unit, layout = self._unit, f"a {self.kind} layout with cp_size {self.cp_size}"
        if self.seq_len <= unit or self.seq_len % unit:
            raise ValueError(
                f"seq_len must be a multiple of {unit}, and greater, for documents in {layout}, got {self.seq_len}"
            )
        if not 1 <= self.num_documents * unit < self.seq_len:
            raise ValueError(
                f"num_documents must be in [1, {(self.seq_len - 1) // unit}] for {self.seq_len} tokens in {layout}, "
                f"got {self.num_documents}"
            )
        if self.num_documents > len(self.corpus.documents):
            raise ValueError(
                f"num_documents must be at most the {len(self.corpus.documents)} documents that the data holds, "
                f"got {self.num_documents}: give more data, as a folder of files, or pack fewer"
            )

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, and its layout.

        Returns:
            `input_ids`, `labels`, `position_ids` (int64) and `loss_mask` (float32), each [batch_size, seq_len].

        Raises:
            TokenError: naming a token id outside of the vocabulary and its place.
        """
        return self._dense(step) if self.num_documents is None else self._packed(step, self.num_documents)

    @property
    def _unit(self) -> int:
        return lcm(length_unit(self.cp_size, self.kind), self.multiple_of)

    def _dense(self, step: int) -> Batch:
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

    def _packed(self, step: int, num_documents: int) -> Batch:
        first = step * self.batch_size * num_documents
        count = len(self.corpus.documents)
        lap = first // count  # each pass over the corpus begins one document later, so that packings differ
        chosen = [(first + lap + i) % count for i in range(self.batch_size * num_documents)]
        whole = [self.corpus.documents[at].num_tokens for at in chosen[:num_documents]]
        share = min(1.0, (self.seq_len - num_documents * self._unit) / sum(whole))
        lengths = [max(1, int(length * share)) for length in whole]  # their padded sum fits in seq_len
        streams = []
        for row in range(self.batch_size):  # all rows have the bounds of the first
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

    def _checked(self, tokens: Tokens, at: int) -> npt.NDArray[np.int64]:
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            bad = int(np.argmax(tokens >= self.vocab_size))
            position = (at + bad) % int(self.corpus.bounds[-1])
            index = self.corpus.document_at(position)
            document = self.corpus.documents[index]
            raise TokenError(
                f"token id {int(tokens[bad])} in {document.path.name}"
                f"[{document.offset + position - int(self.corpus.bounds[index])}] is outside of the vocabulary: ids "
                f"must be in [0, {self.vocab_size - 1}]"
            )
        return tokens.astype(np.int64)
