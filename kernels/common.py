"""What the kernels share: the constants of an exchange, the geometry of a plan, tensors of several widths."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from overlap_mtp.exchange.plan import (
    CU_SEQLENS,
    FINGERPRINT,
    NO_DOCUMENT,
    NUM_DOCUMENTS,
    SEQ_LEN,
    ExchangePlan,
)
from overlap_mtp.exchange.spec import ExchangeSpec

FINGERPRINT_AT = tl.constexpr(FINGERPRINT)
NUM_DOCUMENTS_AT = tl.constexpr(NUM_DOCUMENTS)
SEQ_LEN_AT = tl.constexpr(SEQ_LEN)
CU_AT = tl.constexpr(CU_SEQLENS)
NO_DOCUMENT_AT = tl.constexpr(int(NO_DOCUMENT))
MAX_WAITING = 32  # programs that may wait for peers at a time: they keep their places on the device
FLAG_WORDS = 16  # a flag in symmetric memory has a 128-byte line of its own


class ExchangeConstants(NamedTuple):
    """All that is fixed for an exchange. The kernels take it as one constant, `C`."""

    widths: tuple[int, ...]  # the distinct sizes of an element, in bytes
    num_widths: int
    num_tensors: int  # columns of the spec: views [batch_rows, L] of tensors
    padded_tensors: int  # the next power of two
    batch_rows: int
    num_depths: int
    padded_depths: int  # the next power of two
    cp_size: int
    cp_rank: int
    num_chunks: int
    held_chunks: tuple[int, ...]
    by_document: bool
    max_documents: int
    search_steps: int  # of a bisection of max_documents bounds
    num_send_rows: int
    num_recv_rows: int
    num_sources: int
    padded_sources: int  # the next power of two
    num_destinations: int
    routes_at: int  # in the plan's table
    headers_at: int
    metadata_len: int  # words of the plan's metadata; the addresses of the tensors and of their rolls follow
    addresses_end: int  # all words
    metadata_block: int  # the next power of two
    is_replayable: bool  # replay_metadata replaces the metadata as soon as it holds some
    # Symmetric memory only (overlap_mtp.exchange.symmetric.MemoryLayout):
    num_buffers: int
    buffer_words: int
    signals_at: int
    acknowledgements_at: int
    part_rows: int
    num_parts: int
    num_shares: int  # programs for each peer that share the parts
    on_gpu: bool  # otherwise ranks run one after the other, and timeouts are turns of the waiting loop
    flag_words: int = FLAG_WORDS

    @classmethod
    def of(
        cls,
        spec: ExchangeSpec,
        plan: ExchangePlan,
        is_replayable: bool = False,
        memory: tuple[int, int, int, int, int, int] = (1, 0, 0, 0, 1, 1),
        on_gpu: bool = True,
    ) -> ExchangeConstants:
        """Collect the constants of one rank's exchanges.

        Args:
            spec: which tensors.
            plan: of this rank.
            is_replayable: for exchanges that are captured in a CUDA graph.
            memory: num_buffers and all that follows, of the symmetric memory. The last one is num_parts.
            on_gpu: False under the interpreter.

        Returns:
            The constants.
        """
        widths = tuple(sorted(set(spec.widths)))
        tensors = spec.num_columns
        addresses_end = plan.metadata_len + tensors * (1 + plan.num_depths)
        return cls(
            widths,
            len(widths),
            tensors,
            triton.next_power_of_2(tensors),
            spec.batch_rows,
            plan.num_depths,
            triton.next_power_of_2(plan.num_depths),
            plan.cp_size,
            plan.cp_rank,
            plan.num_chunks,
            plan.held_chunks,
            plan.by_document,
            plan.max_documents,
            (plan.max_documents - 1).bit_length(),
            plan.num_send_rows,
            plan.num_recv_rows,
            len(plan.sources),
            triton.next_power_of_2(max(1, len(plan.sources))),
            len(plan.destinations),
            plan.routes_at,
            plan.headers_at,
            plan.metadata_len,
            addresses_end,
            triton.next_power_of_2(addresses_end),
            is_replayable,
            *memory,
            min(memory[-1], max(1, MAX_WAITING // max(1, len(plan.sources), len(plan.destinations)))),
            on_gpu,
        )


@triton.jit
def as_pointer(address, WIDTH: tl.constexpr, ALIGNED: tl.constexpr = 1):
    """Addresses as pointers to integers of WIDTH bytes. A single one may be said to be a multiple of ALIGNED bytes."""
    if WIDTH == 8:
        pointer = address.to(tl.pointer_type(tl.int64))
    elif WIDTH == 4:
        pointer = address.to(tl.pointer_type(tl.int32))
    elif WIDTH == 2:
        pointer = address.to(tl.pointer_type(tl.int16))
    else:
        pointer = address.to(tl.pointer_type(tl.uint8))
    if ALIGNED > 1:  # here: it counts in the function that makes the pointer
        pointer = tl.multiple_of(pointer, ALIGNED)
    return pointer


@triton.jit
def metadata_of(host_metadata, replay_metadata, C: tl.constexpr):
    """Where to read the metadata: in the host's memory, or the one that replaces it in replays."""
    source = host_metadata
    if C.is_replayable:
        fingerprint = tl.atomic_add(replay_metadata + FINGERPRINT_AT, 0, sem="acquire", scope="gpu")
        source = tl.where(fingerprint >= 0, replay_metadata, host_metadata)
    return source


@triton.jit
def copy_words(source, target, FIRST: tl.constexpr, END: tl.constexpr, BLOCK: tl.constexpr):
    """Copy words [FIRST, END), at most BLOCK."""
    at = FIRST + tl.arange(0, BLOCK)
    inside = at < END
    tl.store(target + at, tl.load(source + at, mask=inside, other=0), mask=inside)


@triton.jit
def copy_metadata(source, target, C: tl.constexpr, FIRST: tl.constexpr = 0):
    """Copy the metadata from word FIRST to its end."""
    copy_words(source, target, FIRST, C.addresses_end, C.metadata_block)


@triton.jit
def rows_in_use(metadata, stride, C: tl.constexpr):
    """Rows of a message that the batch uses, without the header, if each of its sequences has `stride`."""
    sequences = 1
    if C.by_document:
        sequences = tl.load(metadata + NUM_DOCUMENTS_AT).to(tl.int32)
    return sequences * stride.to(tl.int32)


@triton.jit
def local_len_of(metadata, C: tl.constexpr):
    """Tokens that each rank holds. 32 bits: 64-bit divisions are slow."""
    return tl.load(metadata + SEQ_LEN_AT).to(tl.int32) // C.cp_size


@triton.jit
def last_at_or_below(bounds, value, COUNT: tl.constexpr, STEPS: tl.constexpr):
    """The last of COUNT rising bounds that is <= value [BLOCK]. The first bound must be. Bisects in STEPS steps."""
    found = tl.zeros_like(value).to(tl.int32)
    for step in tl.static_range(STEPS):
        candidate = found + (1 << (STEPS - 1 - step))
        known = candidate < COUNT
        bound = tl.load(bounds + candidate, mask=known, other=0)
        found = tl.where(known & (bound <= value), candidate, found)
    return found


@triton.jit
def bounds_of(metadata, sequence, known, C: tl.constexpr):
    """(start, end) of sequences [BLOCK]. Those that are not known have none."""
    if C.by_document:
        start = tl.load(metadata + CU_AT + sequence, mask=known, other=0).to(tl.int32)
        end = tl.load(metadata + CU_AT + sequence + 1, mask=known, other=0).to(tl.int32)
    else:
        start = tl.zeros_like(sequence)
        end = start + tl.load(metadata + SEQ_LEN_AT).to(tl.int32)
    return start, end


@triton.jit
def chunk_of(metadata, local_index, C: tl.constexpr):
    """Where local tokens [BLOCK] lie: (sequence, its start, length of its chunks, which held chunk, offset in it)."""
    if C.by_document:
        sequence = last_at_or_below(
            metadata + CU_AT, local_index * C.cp_size, C.max_documents, C.search_steps
        )
    else:
        sequence = tl.zeros_like(local_index)
    start, end = bounds_of(metadata, sequence, sequence >= 0, C)
    chunk_len = tl.maximum((end - start) // C.num_chunks, 1)
    within = local_index - start // C.cp_size
    held = tl.minimum(within // chunk_len, C.num_chunks // C.cp_size - 1)
    return sequence, start, chunk_len, held, within - held * chunk_len


@triton.jit
def held_chunk(held, C: tl.constexpr):
    """Which chunk of its sequence a held one is."""
    return tl.where(held == 0, C.held_chunks[0], C.held_chunks[C.num_chunks // C.cp_size - 1])


@triton.jit
def document_of(metadata, sequence, position, C: tl.constexpr):
    """(document, its valid end, which is negative for a tail) of positions [BLOCK] of the stream."""
    document = sequence
    if not C.by_document:
        document = last_at_or_below(metadata + CU_AT, position, C.max_documents, C.search_steps)
    return document, tl.load(metadata + CU_AT + (C.max_documents + 1) + document)
