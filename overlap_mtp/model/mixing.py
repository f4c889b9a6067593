"""Mixing of hidden states: each position of a depth takes its input from one earlier depth, at random.

Depth k has k candidates: h_0 of the trunk and h_j of depth j < k. Position i of h_j, rolled by k - 1 - j, is
h_j[i + k - 1 - j]: all candidates predict the token at i + k. One of them is chosen uniformly for each position. It is
the mixing of Megatron-LM's `mtp_hsm`.

The choice is a hash of (the row's key, the position in the sequence, the depth). It does not depend on how many ranks
share the sequence, and needs no state of a random generator.
"""

from __future__ import annotations

import torch

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.model.activations import ActivationRollers, RolledRows
from overlap_mtp.tensors import upload

# SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014), as signed 64-bit integers.
GAMMA, FIRST, SECOND = (
    constant - 2**64 for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
CHOICE_BITS = 31  # of a hash: the low bits, so that they are not negative


def hash_word(state: torch.Tensor, word: torch.Tensor | int) -> torch.Tensor:
    """Return the hashes of `word` after what `state` is the hash of. int64; sums and products wrap around."""
    bits = state + word + GAMMA
    bits = (bits ^ _shift_right(bits, 30)) * FIRST
    bits = (bits ^ _shift_right(bits, 27)) * SECOND
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Shift right and fill with zeros; `>>` fills with the sign."""
    return bits >> count & ((1 << 64 - count) - 1)


def mixing_keys(seed: int, step: int, batch: int, rows: int, device: torch.device) -> torch.Tensor:
    """Return the keys of a batch's rows, int64 [rows].

    Args:
        seed: of the run, in [0, 2^63 - 1].
        step: number of the step.
        batch: number of the batch in the step, over all dp ranks and microbatches.
        rows: rows of the batch.
        device: of the result. The host does not wait for it.
    """
    state = torch.zeros(rows, dtype=torch.int64)
    for word in (seed, step, batch, torch.arange(rows)):
        state = hash_word(state, word)
    return upload(state.numpy(), device)


class MixingChoice:
    """The choices of one microbatch on this rank.

    Args:
        keys: int64 [B], a key for each row.
        layout: of the batch.
        cp_rank: this rank in the cp group.
        tp: this rank in the tp group, and its size: each tp rank holds a part of the cp rank's tokens.
    """

    def __init__(
        self, keys: torch.Tensor, layout: SequenceLayout, cp_rank: int, tp: tuple[int, int] = (0, 1)
    ) -> None:
        tp_rank, tp_size = tp
        positions = upload(layout.positions(cp_rank), keys.device).chunk(tp_size)[tp_rank]
        self._state = hash_word(hash_word(torch.zeros_like(keys), keys)[:, None], positions)

    def at(self, depth: int) -> torch.Tensor:
        """Return the chosen candidate of each position, 0 .. depth - 1: int64 [B, L] or a tp rank's part."""
        bits: torch.Tensor = hash_word(self._state, depth) & (2**CHOICE_BITS - 1)
        return bits % depth


class StateMixer:
    """The hidden states of one microbatch that later depths choose from.

    Args:
        choice: the choices of the microbatch.
        rollers: start the exchanges.
        layout: of the batch.
        num_depths: of the MTP block.
    """

    def __init__(
        self, choice: MixingChoice, rollers: ActivationRollers, layout: SequenceLayout, num_depths: int
    ) -> None:
        self._choice, self._rollers, self._layout = choice, rollers, layout
        self._num_depths = num_depths
        self._older: list[RolledRows] = []  # by depth of birth, from 0

    def input_of(self, depth: int, newest: torch.Tensor) -> torch.Tensor:
        """Return the input hidden states of a depth. Call it for each depth, from 1 on.

        It starts the exchange of the newest states, which depth + 1 joins: it travels under the layer of this depth.

        Args:
            depth: k.
            newest: the hidden states of depth k - 1, [B, L, hidden].

        Returns:
            Shaped as `newest`. Where an older state lies past the end of the document, it is 0; no loss sees it.
        """
        older = list(self._older)
        if depth < self._num_depths:
            use, num_rolls = f"hidden_{depth - 1}", self._num_depths - depth
            self._older.append(self._rollers.start(use, newest, num_rolls, self._layout))
        mixed = newest
        if older:
            chosen = self._choice.at(depth)[..., None]
            for born, states in enumerate(older):
                mixed = torch.where(chosen == born, states.at(depth - 1 - born), mixed)
        return mixed
