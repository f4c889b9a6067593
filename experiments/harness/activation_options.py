"""The options of a model whose depths use rolled activations."""

from __future__ import annotations

from dataclasses import dataclass

from overlap_mtp.model.config import Distillation, MTPInputs


@dataclass(frozen=True)
class ActivationOptions:
    """What the depths use of other tokens' activations."""

    mtp_inputs: MTPInputs = "ids"
    """What the depths take: ids, which are embedded when they are rolled, or the trunk's embeddings, rolled."""
    hidden_state_mixing: bool = False
    """Take the inputs of depths from the hidden states of all earlier ones, rolled."""
    distillation: Distillation = "none"
    """Compare the depths' distributions with the trunk's, whose hidden states are rolled."""
    distillation_weight: float = 1.0
    """Weight of that comparison in the loss of each depth."""
