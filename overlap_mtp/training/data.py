"""Packed or dense batches of a corpus.

Every rank builds the same full batch from a step number, and takes its shard.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from math import lcm

import numpy as np
import numpy.typing as npt
import torch

from overlap_mtp.documents import pad_documents
from overlap_mtp.layout import Kind, SequenceLayout, length_unit
from overlap_mtp.training.corpus import PIECE_TOKENS, Corpus, Document, TokenError, Tokens, open_corpus

__all__ = ["PACKING", "PIECE_TOKENS", "BatchStream", "Corpus", "Document", "TokenError", "open_corpus"]
Batch = tuple[dict[str, torch.Tensor], SequenceLayout]
PACKING = "documents fill the sequence"  # a run that resumes must pack documents in the same way


@dataclass(frozen=True)
class BatchStream:
    """Full-length batches of a corpus, by step; the same on every rank.

    Dense (`num_documents` is None): rows of the corpus's stream; a document begins right after the one before.
    Packed: `num_documents` documents in each batch. Their beginnings, in proportion to their lengths, fill `seq_len`;
    what is left over goes to the first documents that can use it. Each document is padded to a multiple of the layout's
    unit, has its own positions, and has no label past its end.
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
                f"num_documents (--documents) must be in [1, {(self.seq_len - 1) // unit}] for {self.seq_len} tokens "
                f"in {layout}, got {self.num_documents}"
            )
        if self.num_documents > len(self.corpus.documents):
            raise ValueError(
                f"num_documents (--documents) must be at most the {len(self.corpus.documents)} documents that the data "
                f"holds, got {self.num_documents}: give more data, as a folder of files, or pack fewer"
            )

    def filled(self, batches: int = 8) -> float:
        """Return the share of the tokens that are of documents and not padding, in the first batches."""
        if self.num_documents is None:
            return 1.0
        tokens = sum(int(self._documents(step, self.num_documents)[1].sum()) for step in range(batches))
        return tokens / (batches * self.seq_len)

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
        }, layout.of_batch(_name(rows))

    def _documents(self, step: int, num_documents: int) -> tuple[list[int], npt.NDArray[np.int64]]:
        """Return which documents a batch packs, row by row, and how much of each document of a row."""
        first = step * self.batch_size * num_documents
        count = len(self.corpus.documents)
        lap = first // count  # each pass over the corpus begins one document later, so that packings differ
        chosen = [(first + lap + i) % count for i in range(self.batch_size * num_documents)]
        sizes = [self.corpus.documents[at].num_tokens for at in chosen]
        rows = np.array(sizes).reshape(self.batch_size, num_documents)
        return chosen, fill(rows.min(0), self.seq_len, self._unit)

    def _packed(self, step: int, num_documents: int) -> Batch:
        chosen, of_each = self._documents(step, num_documents)
        lengths, streams = of_each.tolist(), []
        for row in range(self.batch_size):  # all rows have the bounds of the first
            starts = self.corpus.bounds[chosen[row * num_documents : (row + 1) * num_documents]].tolist()
            documents = [
                self._checked(self.corpus.read(at, n), at) for at, n in zip(starts, lengths, strict=True)
            ]
            stream, layout = pad_documents(
                documents, self.cp_size, self.kind, seq_len=self.seq_len, multiple_of=self.multiple_of
            )
            streams.append(stream)
        ids = torch.from_numpy(tokens := np.stack(streams))
        offsets = torch.from_numpy(layout.unshard([layout.offsets(rank) for rank in range(self.cp_size)]))
        has_label = torch.from_numpy(layout.unshard([layout.valid(rank, 1) for rank in range(self.cp_size)]))
        return {
            "input_ids": ids,
            "labels": torch.where(has_label, ids.roll(-1, dims=1), 0),
            "position_ids": offsets.repeat(self.batch_size, 1),
            "loss_mask": has_label.float().repeat(self.batch_size, 1),
        }, layout.of_batch(_name(tokens))

    def _checked(self, tokens: Tokens, at: int) -> npt.NDArray[np.int64]:
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            bad = int(np.argmax((tokens < 0) | (tokens >= self.vocab_size)))
            position = (at + bad) % int(self.corpus.bounds[-1])
            index = self.corpus.document_at(position)
            document = self.corpus.documents[index]
            raise TokenError(
                f"token id {int(tokens[bad])} in {document.path.name}"
                f"[{document.offset + position - int(self.corpus.bounds[index])}] is outside of the vocabulary: ids "
                f"must be in [0, {self.vocab_size - 1}], or vocab_size (--vocab-size) larger"
            )
        return tokens.astype(np.int64)


def _name(tokens: npt.NDArray[np.int64]) -> str:
    """Return a hash of a batch's tokens, by which exchanges tell it from others."""
    return f"{zlib.crc32(tokens.tobytes()):08x}"


def fill(sizes: npt.NDArray[np.int64], seq_len: int, unit: int) -> npt.NDArray[np.int64]:
    """Return how much of each document's beginning is packed, so that as little of the sequence as possible is padding.

    Args:
        sizes: tokens of each document, at least 1.
        seq_len: tokens of the sequence, at least a unit for each document.
        unit: each document is padded to a multiple of it.
    """
    units = np.ones_like(sizes)
    left, rest = seq_len // unit - len(sizes), np.maximum(sizes - unit, 0)
    share = min(1.0, left * unit / max(1, int(rest.sum())))
    units += np.minimum(rest, (rest * share).astype(np.int64)) // unit
    left = seq_len // unit - int(units.sum())
    # A whole unit more, the first documents first.
    while left and (open_to := np.flatnonzero(sizes >= (units + 1) * unit)).size:
        units[open_to[:left]] += 1
        left -= len(open_to[:left])
    partly = np.argsort(units * unit - sizes, kind="stable")  # the most tokens beyond its units first
    units[[at for at in partly if sizes[at] > units[at] * unit][:left]] += 1
    return np.minimum(sizes, units * unit)
