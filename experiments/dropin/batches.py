"""Batches of random tokens, dense or of packed documents, dealt to context-parallel ranks as Megatron-LM expects."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from dropin.sizes import Problem
from overlap_mtp import SequenceLayout
from overlap_mtp.layout import Kind
from overlap_mtp.model.attention import AttentionPlan, Rope, attention_plan, rope

MASKED = 0.1  # the part of the tokens that the loss leaves out


class Batch:
    """One sequence of random tokens, and this rank's part of it.

    The tensors are [1, tokens of a rank]: `input_ids`, `labels` and `position_ids` int64, `loss_mask` float32. They
    are the same for all tp ranks. `plan` and `rope` are what our attention needs.

    Args:
        problem: the sizes.
        documents: how many are packed into the sequence, each of a random length; 0 for one dense stream.
        seed: of tokens and lengths; the same on all ranks.
        device: of the tensors.
    """

    def __init__(self, problem: Problem, documents: int, seed: int, device: torch.device) -> None:
        cp_size, cp_rank = problem.cp, parallel_state.get_context_parallel_rank()
        total, unit = problem.seq_len, problem.length_unit
        random = np.random.default_rng(seed)
        self.cu_seqlens: list[int] | None = None
        if documents:
            cuts = unit * np.sort(random.choice(np.arange(1, total // unit), documents - 1, replace=False))
            self.cu_seqlens = [0, *cuts.tolist(), total]
        kind: Kind = "zigzag" if cp_size > 1 else "contiguous"
        layout = (
            SequenceLayout.packed(self.cu_seqlens, cp_size, kind)
            if self.cu_seqlens
            else SequenceLayout.dense(total, cp_size, kind)
        )
        stream = torch.from_numpy(random.integers(1, problem.model.vocab_size, (1, total + 1)))
        mask = torch.from_numpy((random.random((1, total)) > MASKED).astype(np.float32))

        def held(full: torch.Tensor) -> torch.Tensor:
            return layout.shard(full, cp_rank).contiguous().to(device)

        self.input_ids, self.labels, self.loss_mask = held(stream[:, :-1]), held(stream[:, 1:]), held(mask)
        self.position_ids = torch.from_numpy(layout.offsets(cp_rank))[None].to(device)
        self.num_tokens = self.loss_mask.sum()
        self.device = device
        self.plan: AttentionPlan = attention_plan(layout, cp_rank, 1, device, problem.dtype)
        cos, sin = rope(self.position_ids, problem.model, problem.dtype)
        self.rope: Rope = cos[:, :, 0], sin[:, :, 0]  # each [1, tokens of a rank, 1, head_dim]

    def packed_seq_params(self, on_host: bool) -> PackedSeqParams | None:
        """Return new parameters, as a data loader makes them for each microbatch, so that nothing is cached in them.

        Args:
            on_host: whether `cu_seqlens` stay in host memory. Then Megatron-LM reads them without a wait for the GPU.

        Returns:
            None if the batch is dense.
        """
        if self.cu_seqlens is None:
            return None
        bounds = torch.tensor(self.cu_seqlens, dtype=torch.int32)
        if not on_host:
            bounds = bounds.to(self.device)
        longest = max(end - begin for begin, end in pairwise(self.cu_seqlens))
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
