"""Make the metadata of a batch on the device, from the bounds of its documents there: one launch of one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from overlap_mtp.kernels.common import (
    CU_AT,
    FINGERPRINT_AT,
    NO_DOCUMENT_AT,
    NUM_DOCUMENTS_AT,
    SEQ_LEN_AT,
    ExchangeConstants,
    as_pointer,
    copy_metadata,
)
from overlap_mtp.kernels.launch import Launch

ILLEGAL_BOUNDS = tl.constexpr(3)  # the word of `error_flags` for them
TAIL_AT = tl.constexpr(-1)  # overlap_mtp.layout.TAIL
ODD_A = tl.constexpr(-7046029254386353131)
ODD_B = tl.constexpr(-4417276706812531889)


@triton.jit
def load_bounds(address, width, at, inside):
    """Entries of a tensor of int32 or int64 at `address`, as int64 [BLOCK]."""
    wide = tl.load(as_pointer(address, 8) + at, mask=inside & (width == 8), other=0)
    narrow = tl.load(as_pointer(address, 4) + at, mask=inside & (width == 4), other=0)
    return wide + narrow.to(tl.int64)


@triton.jit
def write_bounds_kernel(
    host_metadata,  # int64 [addresses_end], as overlap_mtp.exchange.plan.write_references leaves it
    metadata,  # int64 [addresses_end], on the device
    error_flags,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    copy_metadata(host_metadata, metadata, C)
    tl.debug_barrier()
    documents = tl.load(host_metadata + NUM_DOCUMENTS_AT)
    seq_len = tl.load(host_metadata + SEQ_LEN_AT)
    cu_seqlens = tl.load(host_metadata + CU_AT)
    cu_valid = tl.load(host_metadata + CU_AT + 1)
    width = tl.load(host_metadata + CU_AT + 2)
    at = tl.arange(0, BLOCK).to(tl.int64)
    begin = load_bounds(cu_seqlens, width, at, at <= documents)
    end = load_bounds(cu_seqlens, width, at + 1, at < documents)
    length = end - begin
    has_valid = cu_valid != 0
    valid_begin = load_bounds(cu_valid, width, at, has_valid & (at < documents))
    valid_end = load_bounds(cu_valid, width, at + 1, has_valid & (at < documents))
    valid = tl.where(has_valid, valid_end - valid_begin, length)
    legal = (begin <= end) & (end <= seq_len) & (valid >= 0) & (valid <= length) & ((at > 0) | (begin == 0))
    if C.by_document:
        legal = legal & (length % C.num_chunks == 0)
    if tl.sum(((at < documents) & ~legal).to(tl.int32), 0) > 0:
        tl.store(error_flags + ILLEGAL_BOUNDS, 1)
        documents = documents * 0  # nothing but a tail
    covered = tl.sum(tl.where((at == documents) & (documents > 0), begin, 0), 0)
    in_use = documents + (covered < seq_len).to(tl.int64)  # with the tail

    bound = tl.where(at < in_use, tl.where(at < documents, begin, covered), NO_DOCUMENT_AT)
    bound = tl.where(at == in_use, seq_len, bound)
    ends = tl.where(at < documents, begin + valid, TAIL_AT)
    tl.store(metadata + CU_AT + at, bound, mask=at <= C.max_documents)
    tl.store(metadata + CU_AT + C.max_documents + 1 + at, ends, mask=at < in_use)
    tl.store(metadata + NUM_DOCUMENTS_AT, in_use)
    words = tl.where(at <= in_use, bound * (2 * at * ODD_A + ODD_B) + ends * (2 * at * ODD_B + ODD_A), 0)
    checksum = (tl.sum(words, 0) >> 32) & 0xFFFFFFFF
    tl.store(metadata + FINGERPRINT_AT, tl.load(host_metadata + FINGERPRINT_AT) ^ checksum)


def write_bounds(
    host_metadata: torch.Tensor,
    metadata: torch.Tensor,
    error_flags: torch.Tensor,
    constants: ExchangeConstants,
) -> Launch:
    """Bind the kernel that makes the metadata of a DeviceLayout.

    It writes what `overlap_mtp.exchange.plan.write_metadata` writes of the same layout on the host, with another
    checksum. If the bounds are illegal it sets a word of `error_flags`, and the whole stream becomes a tail.

    Args:
        host_metadata: int64, as `overlap_mtp.exchange.plan.write_references` leaves it.
        metadata: the same, on the device.
        error_flags: int32 [4], may be pinned host memory.
        constants: of the exchange.

    Returns:
        The launch.
    """
    block = triton.next_power_of_2(constants.max_documents + 1)
    buffers = (host_metadata, metadata, error_flags)
    return Launch(write_bounds_kernel, buffers, (1, 1, 1), C=constants, BLOCK=block)
