"""The sizes of the benchmark. This imports no Megatron-LM, so that options are checked before any rank starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from overlap_mtp.model.config import ModelConfig

# By name: hidden, layers, heads, key heads, ffn, vocabulary, tokens of a rank.
SIZES = {
    "h4096": (4096, 4, 32, 8, 11264, 32768, 4096),
    "h2048": (2048, 2, 16, 4, 5632, 32768, 1024),
    "tiny": (64, 2, 4, 2, 128, 96, 64),
}


@dataclass(frozen=True)
class Problem:
    """What a step computes.

    Raises:
        ValueError: sizes that do not fit together.
    """

    model: ModelConfig
    tokens_per_rank: int  # of a cp rank
    cp: int
    tp: int = 1
    sequence_parallel: bool = False
    recompute: bool = False
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.model.num_kv_heads % self.tp:
            raise ValueError(
                f"tp must divide the number of key heads, {self.model.num_kv_heads}, got {self.tp}"
            )
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("--sequence-parallel needs --tp of 2 or more")

    @property
    def seq_len(self) -> int:
        """Tokens of the whole sequence, over all ranks."""
        return self.tokens_per_rank * self.cp

    @property
    def length_unit(self) -> int:
        """What a document's length is a multiple of: a chunk of one token for each half of each cp rank."""
        return 2 * self.cp

    def check_documents(self, documents: int) -> None:
        """Raise ValueError if the sequence has no room for this number of documents."""
        most = self.seq_len // self.length_unit
        if not 0 <= documents <= most:
            raise ValueError(f"--documents must be in [0, {most}] at this size (0: dense), got {documents}")


def problem_of(
    size: str, depths: int, ranks: int, tp: int, sequence_parallel: bool, recompute: bool, dtype: torch.dtype
) -> Problem:
    """Return the problem of a size.

    Args:
        size: a name of SIZES.
        depths: MTP layers.
        ranks: all of them; those of a tp group share a sequence's tokens.
        tp: ranks that share each layer's weights.
        sequence_parallel: whether these ranks also share the tokens between layers.
        recompute: whether each layer's activations are computed again in the backward pass.
        dtype: of weights and activations.

    Raises:
        ValueError: if the size is unknown or the numbers do not fit.
    """
    if size not in SIZES:
        raise ValueError(f"preset must be one of {', '.join(SIZES)}, got {size!r}")
    if tp < 1 or ranks % tp:
        raise ValueError(f"tp must be at least 1 and divide the number of ranks, {ranks}, got {tp}")
    hidden, layers, heads, kv_heads, ffn, vocab, tokens = SIZES[size]
    model = ModelConfig(hidden, layers, depths, heads, kv_heads, ffn, vocab, mtp_loss_factor=0.1)
    return Problem(model, tokens, ranks // tp, tp, sequence_parallel, recompute, dtype)
