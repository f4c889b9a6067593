"""Model FLOPs of a training step, and the share of a GPU's peak that they make (MFU)."""

from __future__ import annotations

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.model.config import ModelConfig

# Dense bfloat16, by the name that CUDA gives the GPU. Source: NVIDIA's data sheets of the H100 and H200 (SXM).
PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200": 989.4}


def attention_pairs(layout: SequenceLayout) -> int:
    """Return how many pairs of a query and a key attention needs: n * (n + 1) / 2 in a document of n tokens."""
    lengths = layout.valid_lengths.clip(0)  # a tail has none
    return int((lengths * (lengths + 1) // 2).sum())


def step_flops(config: ModelConfig, tokens: int, pairs: int) -> int:
    """Return the model FLOPs of a step, as PaLM (arXiv 2204.02311, appendix B) and Megatron-LM count them.

    They are those of the matrix products that the model needs, whatever a run computes: 2 for each multiplication and
    addition, and forward and backward together take three times those of forward. They hold

    - trunk layers: projections of attention, the feed-forward layer or the router and the experts that a token goes to;
    - each MTP depth: the projection of (embedding, hidden states) and one layer, although depths may share weights;
    - the head, once for the LM loss and once for each depth; with distillation, once more for each depth, and without
      backward if the teacher is detached;
    - attention scores and weighted values: only pairs within a document, of a query and the keys up to it.

    They do not hold padding, recomputation, masked pairs, embeddings, norms, rotations, softmax or the optimizer. With
    `detach_mtp` backward is counted in full, too.

    Args:
        config: the model.
        tokens: of documents, in all sequences of the step; each goes through all depths.
        pairs: what `attention_pairs` returns, summed over all sequences of the step.
    """
    hidden, width = config.hidden_size, config.num_heads * config.head_dim
    projections = hidden * (2 * width + 2 * config.num_kv_heads * config.head_dim)
    ffn = 3 * hidden * config.ffn_size * (config.experts_per_token if config.num_experts else 1)
    layer = projections + ffn + hidden * config.num_experts  # the router's
    layers, depths = config.num_layers + config.num_depths, config.num_depths
    weights = layers * layer + depths * 2 * hidden * hidden + (1 + depths) * hidden * config.vocab_size
    teacher = depths * hidden * config.vocab_size if config.distillation != "none" else 0
    passes = 1 if config.distillation_detach else 3
    return 2 * (3 * (tokens * weights + layers * pairs * 2 * width) + passes * tokens * teacher)
