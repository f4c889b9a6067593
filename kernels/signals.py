"""Flags in symmetric memory: how one rank's kernel tells another's that data is there, or that a buffer is free."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

THREADS = tl.constexpr(128)  # of a program that waits


@triton.jit
def flag_of(flags, seq_no, rank, part, parts, C: tl.constexpr):
    """The flag of an exchange's buffer, a cp rank, and one of the parts of its message."""
    return flags + ((seq_no % C.num_buffers * C.cp_size + rank) * parts + part) * C.flag_words


@triton.jit
def signal(flags, seq_no, known=None):
    """Set flags to `seq_no`, where `known`. A rank that sees one also sees all that this program wrote before."""
    tl.debug_barrier()  # without it triton 3.6 lets one warp release before the others have stored
    tl.atomic_xchg(flags, seq_no, mask=known, sem="release", scope="sys")


@triton.jit
def give_up(late, said, timeout):
    """Write into the word `late` which rank is late, and end all waits. Later ones are not written: they follow."""
    patience = tl.load(timeout)
    tl.store(late, said.to(tl.int32), mask=patience > 0)
    tl.store(timeout, tl.zeros_like(patience))


@triton.jit
def is_any(condition):
    """Whether any thread says so. Each reads clock and memory for itself, but they must leave a loop together."""
    return tl.max(condition.to(tl.int32) + tl.zeros((THREADS,), tl.int32), axis=0) > 0


@triton.jit
def wait_signal(flag, seq_no, timeout, ON_GPU: tl.constexpr):
    """Wait until a flag, or each of THREADS flags, has reached `seq_no`.

    False for one that has not after `timeout` (ns on GPUs, otherwise turns).
    """
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    waited = tl.zeros_like(timeout)
    begin = waited
    if ON_GPU:
        begin = globaltimer()
    while is_any((seen < seq_no) & (waited < timeout)):
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        if ON_GPU:
            waited = globaltimer() - begin
        else:
            waited += 1
    tl.debug_barrier()
    return seen >= seq_no
