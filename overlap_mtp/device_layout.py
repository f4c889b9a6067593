"""A packed layout whose bounds are on the device, and layouts from what Megatron-LM says of a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from overlap_mtp.layout import Kind, SequenceLayout, batch_checksum, check_stream


@dataclass(frozen=True, eq=False)
class DeviceLayout:
    """Documents end to end, with bounds that only the device knows. The kernels of an exchange read them there.

    Frameworks often have `cu_seqlens` on the GPU. A copy to the host would wait for all work that is queued.

    With NCCL and symmetric memory nobody waits. Illegal bounds are found on the device: rolls then return the tokens
    as they are, and a later `start`, `at` or `raise_if_failed` raises RuntimeError. On CPU ranks, with `sync` and
    `prepared`, and for activations, the bounds are read as a `SequenceLayout`. In a CUDA graph, replays read the bounds
    that are in the tensors then.

    Args:
        cu_seqlens: int32 or int64 [num_documents + 1], contiguous: as for `SequenceLayout.packed`. If the last bound is
            less than `seq_len`, the rest is a tail. On the device of the batch.
        seq_len: tokens of the whole stream.
        cp_size: how many ranks share the stream.
        kind: as for `SequenceLayout.packed`.
        cu_valid: of the same dtype and shape: the running sum of the documents' valid lengths. Default: no document is
            padded. Megatron-LM calls the two `cu_seqlens_q_padded` and `cu_seqlens_q`.
        batch: a checksum of the batch's name, which `of_batch` sets.

    Raises:
        ValueError: if a tensor has another dtype or shape, or the stream cannot be shared.
    """

    cu_seqlens: torch.Tensor
    seq_len: int
    cp_size: int
    kind: Kind = "zigzag"
    cu_valid: torch.Tensor | None = None
    batch: int = 0  # as in SequenceLayout
    is_packed = True

    def __post_init__(self) -> None:
        check_stream(self.seq_len, 0, self.cp_size, self.kind)
        for name, bounds in (("cu_seqlens", self.cu_seqlens), ("cu_valid", self.cu_valid)):
            if bounds is None:
                continue
            if not isinstance(bounds, torch.Tensor):
                raise ValueError(f"{name} must be a tensor, got {type(bounds).__name__}: use SequenceLayout")
            if bounds.dtype not in (torch.int32, torch.int64) or bounds.ndim != 1 or bounds.numel() < 2:
                raise ValueError(
                    f"{name} must be int32 or int64 with at least two entries, got {str(bounds.dtype)[6:]} "
                    f"{list(bounds.shape)}"
                )
            if not bounds.is_contiguous():
                raise ValueError(f"{name} must be contiguous")
            if (bounds.dtype, bounds.shape, bounds.device) != (
                self.cu_seqlens.dtype,
                self.cu_seqlens.shape,
                self.cu_seqlens.device,
            ):
                raise ValueError("cu_valid must have the dtype, the shape and the device of cu_seqlens")

    @property
    def local_len(self) -> int:
        """Tokens that each rank holds."""
        return self.seq_len // self.cp_size

    @property
    def num_documents(self) -> int:
        """The most documents that there can be, with one for a tail."""
        return self.cu_seqlens.numel()

    @property
    def num_used_documents(self) -> int:
        """As num_documents: nobody on the host knows better."""
        return self.cu_seqlens.numel()

    def of_batch(self, name: str) -> DeviceLayout:
        """As `SequenceLayout.of_batch`."""
        return replace(self, batch=batch_checksum(name))

    def pattern(self) -> SequenceLayout:
        """A layout of the same kind and length: its bounds stand for any."""
        return SequenceLayout.packed([0, 0], self.cp_size, self.kind, seq_len=self.seq_len)

    def on_host(self) -> SequenceLayout:
        """Read the bounds, which waits for the device.

        Returns:
            The layout.

        Raises:
            ValueError: as SequenceLayout.packed.
        """
        valid = None if self.cu_valid is None else self.cu_valid.diff()
        layout = SequenceLayout.packed(self.cu_seqlens, self.cp_size, self.kind, valid, self.seq_len)
        return replace(layout, batch=self.batch)


Layout = SequenceLayout | DeviceLayout


def layout_from(packed_seq_params: Any, local_len: int, cp_size: int, kind: Kind = "zigzag") -> Layout:
    """Return the layout that Megatron-LM's PackedSeqParams describe. It never waits for the device.

    Args:
        packed_seq_params: anything with `cu_seqlens_q`, the running sum of the documents' lengths, and
            `cu_seqlens_q_padded`, the bounds of the padded documents. One of them may be None: then no document is
            padded. Tensors on any device, or sequences of integers.
        local_len: tokens of each rank. Those after the last bound are a tail.
        cp_size: how many ranks share the stream.
        kind: as for `SequenceLayout.packed`. The parameters do not say it.

    Returns:
        A DeviceLayout if the bounds are on a GPU.

    Raises:
        ValueError: if there are no bounds, or they cannot be cut.
    """
    valid = packed_seq_params.cu_seqlens_q
    bounds = getattr(packed_seq_params, "cu_seqlens_q_padded", None)
    if bounds is None or bounds is valid:
        bounds, valid = valid, None
    if bounds is None:
        raise ValueError("packed_seq_params must have cu_seqlens_q")
    if isinstance(bounds, torch.Tensor) and bounds.is_cuda:
        return DeviceLayout(bounds, local_len * cp_size, cp_size, kind, valid)
    if isinstance(valid, torch.Tensor) and valid.device.type != "cpu":
        raise ValueError(f"the bounds must be on one device, got cu_seqlens_q on {valid.device} alone")
    bounds, valid = (one.numpy() if isinstance(one, torch.Tensor) else one for one in (bounds, valid))
    lengths = None if valid is None else np.diff(valid)
    return SequenceLayout.packed(bounds, cp_size, kind, lengths, local_len * cp_size)
