"""Flags in symmetric memory: how one rank's kernel tells another's that something is there, or is free again."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

WORDS = 16  # a flag has a 128-byte line of its own
FLAG_WORDS = tl.constexpr(WORDS)


@triton.jit
def flag_at(flags, slot, rank, CP_SIZE: tl.constexpr):
    """The flag of a ring slot and a cp rank."""
    return flags + (slot * CP_SIZE + rank) * FLAG_WORDS


@triton.jit
def raise_flag(flag, epoch):
    """Makes all that this program has written visible to whoever then sees the flag at `epoch`."""
    tl.debug_barrier()  # without it triton 3.6 lets one warp release before the others have stored
    tl.atomic_xchg(flag, epoch, sem="release", scope="sys")


@triton.jit
def wait_for(flag, epoch, patience, TIMED: tl.constexpr):
    """Spins until the flag has reached `epoch`; False where it has not after `patience` (ns, or turns)."""
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    waited = tl.zeros_like(patience)
    begin = waited
    if TIMED:
        begin = globaltimer()
    while (seen < epoch) & (waited < patience):
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        if TIMED:
            waited = globaltimer() - begin
        else:
            waited += 1
    tl.debug_barrier()
    return seen >= epoch
