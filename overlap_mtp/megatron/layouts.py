"""From Megatron-LM's description of a batch to a layout."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from overlap_mtp.device_layout import Layout, layout_from
from overlap_mtp.layout import Kind, SequenceLayout
from overlap_mtp.megatron.settings import Settings


class LeftToMegatronError(Exception):
    """A batch that is left to Megatron-LM, and why."""


def layout_of(packed: Any | None, local_len: int, cp_size: int, settings: Settings) -> Layout:
    """Return the layout of a batch. It never waits for the device.

    Args:
        packed: Megatron-LM's PackedSeqParams; None for a dense batch.
        local_len: tokens of each rank.
        cp_size: how many ranks share the sequence.
        settings: of the drop-in.

    Returns:
        A packed layout; a dense batch is one document, so that batches of other lengths are of the same kind.

    Raises:
        LeftToMegatronError: if no layout of ours fits.
    """
    kind: Kind = settings.layout if cp_size > 1 else "contiguous"
    try:
        if packed is None:
            return _dense(local_len * cp_size, cp_size, kind)
        padded = packed.cu_seqlens_q_padded
        if settings.padding == "megatron" and padded is not None and padded is not packed.cu_seqlens_q:
            raise LeftToMegatronError("padded documents with padding='megatron'")
        return layout_from(packed, local_len, cp_size, kind)
    except ValueError as error:
        raise LeftToMegatronError(f"no layout of ours: {error}") from error


@lru_cache(maxsize=64)
def _dense(seq_len: int, cp_size: int, kind: Kind) -> SequenceLayout:
    return SequenceLayout.packed([0, seq_len], cp_size, kind)
