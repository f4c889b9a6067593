"""Lay documents of any lengths end to end, padded so that ranks can share them."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import Any

import numpy as np
import torch

from overlap_mtp.layout import ArrayOrTensor, Kind, SequenceLayout, check_cp, length_unit


def pad_documents(
    documents: Sequence[Any],
    cp_size: int,
    kind: Kind = "zigzag",
    pad_value: int = 0,
    seq_len: int | None = None,
    multiple_of: int = 1,
) -> tuple[Any, SequenceLayout]:
    """Lay documents of any lengths end to end, padded so that the ranks can share them.

    Args:
        documents: 1-D tensors, arrays or lists of numbers, of one dtype. Empty ones are legal, of any dtype. A
            list becomes a tensor: int64, bool or the default float dtype.
        cp_size: how many ranks share the stream.
        kind: "zigzag", "contiguous" or "zigzag_stream".
        pad_value: what padding holds.
        seq_len: the length S to reach; the last document gets the padding. Default: the shortest legal length.
        multiple_of: pad lengths to multiples of this, too. It makes streams for several `cp_size` the same.

    Returns:
        The padded stream [S], and its packed layout. Its `valid_lengths` are the documents' own lengths.

    Raises:
        ValueError: if there is no document, a document is not 1-D or has another dtype, or a length is illegal.
    """
    check_cp(cp_size, kind)
    if not len(documents):
        raise ValueError("pad_documents needs at least one document, got none")
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be >= 1, got {multiple_of}")
    documents = [_as_array(one, at) for at, one in enumerate(documents)]
    for at, one in enumerate(documents):
        if one.ndim != 1:
            raise ValueError(f"documents must be 1-D, document {at} has shape {tuple(one.shape)}")
    example = next((one for one in documents if one.shape[0]), documents[0])
    for at, one in enumerate(documents):
        if one.shape[0] and one.dtype != example.dtype:
            raise ValueError(
                f"documents must be of one dtype, got {example.dtype} and, in document {at}, {one.dtype}"
            )
    multiple = lcm(length_unit(cp_size, kind), multiple_of)
    valid = np.array([one.shape[0] for one in documents])
    own = multiple if kind == "zigzag" else multiple_of
    lengths = -(-valid // own) * own
    least = max(multiple, -(-int(lengths.sum()) // multiple) * multiple)
    if seq_len is not None and (seq_len < least or seq_len % multiple):
        raise ValueError(
            f"seq_len must be a multiple of {multiple} and at least {least} for these documents, got {seq_len}"
        )
    lengths[-1] += (seq_len or least) - int(lengths.sum())
    layout = SequenceLayout.packed(np.concatenate([[0], np.cumsum(lengths)]), cp_size, kind, valid)
    stream = _full_like(example, layout.seq_len, pad_value)
    for one, start, length in zip(documents, layout.cu_seqlens, valid, strict=False):
        if length:  # an empty one may be of another kind
            stream[start : start + length] = one
    return stream, layout


def _as_array(document: Any, at: int) -> Any:
    """A document as it is if it is a tensor or an array, otherwise as a tensor."""
    if isinstance(document, torch.Tensor | np.ndarray):
        return document
    try:
        values = list(document)
        return torch.tensor(values, dtype=None if values else torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"documents must be 1-D tensors, arrays or lists of numbers, document {at} is a "
            f"{type(document).__name__}: {error}"
        ) from error


def _full_like(example: ArrayOrTensor, length: int, value: int) -> ArrayOrTensor:
    if isinstance(example, torch.Tensor):
        return example.new_full((length,), value)
    return np.full(length, value, example.dtype)
