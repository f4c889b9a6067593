"""The sizes of a model, and the presets that the recorded measurements use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from overlap_mtp.tensors import IGNORE_INDEX

MTPInputs = Literal["ids", "embeddings"]
Distillation = Literal["none", "tv", "kl"]
SIZES = ("hidden_size", "num_layers", "num_depths", "num_heads", "num_kv_heads", "ffn_size", "vocab_size")


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a decoder with `num_layers` trunk layers and `num_depths` MTP depths of one layer each.

    Raises:
        ValueError: if a value is out of range, or if two of them do not fit together.
    """

    hidden_size: int
    num_layers: int
    num_depths: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int  # inner width of SwiGLU, also of each expert
    vocab_size: int
    mtp_loss_factor: float = 0.3  # DeepSeek-V3, arXiv 2412.19437, section 4.2
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    repeat_mtp_layer: bool = False  # all depths share one MTP layer
    detach_mtp: bool = False  # the MTP losses train the MTP block only
    derive_labels: bool = False  # labels are the next ids: the batch brings none
    ignore_index: int = IGNORE_INDEX  # the label that does not count
    mtp_inputs: MTPInputs = "ids"  # depth k embeds the rolled ids, or takes the trunk's embeddings, rolled
    hidden_state_mixing: bool = False  # in training, a depth's input is taken from all earlier depths
    distillation: Distillation = "none"  # a depth's distance from the trunk, added to its loss
    distillation_weight: float = 1.0
    distillation_detach: bool = True  # distillation does not change the trunk's prediction
    num_experts: int = 0  # in each feed-forward layer; 0 means one SwiGLU and no router
    experts_per_token: int = 2
    aux_loss_factor: float = 0.01  # of the load-balancing loss, which is a mean over layers

    @property
    def rolls_activations(self) -> bool:
        """Whether depths use rows of activations that other ranks hold."""
        return self.hidden_state_mixing or self.mtp_inputs == "embeddings" or self.distillation != "none"

    def __post_init__(self) -> None:
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size must be a multiple of 2 * num_heads = {2 * self.num_heads}, got {self.hidden_size}: "
                "the rotary embedding rotates pairs of each head's dimensions"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads = {self.num_kv_heads}, got {self.num_heads}"
            )
        for name in ("mtp_loss_factor", "aux_loss_factor"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and > 0, got {getattr(self, name)}")
        if self.derive_labels and self.ignore_index >= 0:
            raise ValueError(
                f"ignore_index must be < 0 if labels are derived (an id must not be one), got {self.ignore_index}"
            )
        if self.num_experts < 0:
            raise ValueError(f"num_experts must be >= 0, got {self.num_experts}")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token must be in [1, num_experts = {self.num_experts}], got {self.experts_per_token}"
            )
        self._check_activation_uses()

    def _check_activation_uses(self) -> None:
        for name, choices in (("mtp_inputs", get_args(MTPInputs)), ("distillation", get_args(Distillation))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.hidden_state_mixing and self.num_depths < 2:
            raise ValueError(f"hidden_state_mixing needs num_depths >= 2, got {self.num_depths}")
        if self.distillation != "none" and not 0 < self.distillation_weight < math.inf:
            raise ValueError(f"distillation_weight must be finite and > 0, got {self.distillation_weight}")
        if self.distillation != "none" and self.detach_mtp and not self.distillation_detach:
            raise ValueError(
                "distillation_detach must be set if detach_mtp is: the MTP losses would train the trunk otherwise"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def depths_rolled(self) -> int:
        """How many depths the batch is rolled by: derived labels need one more than `num_depths`."""
        return self.num_depths + self.derive_labels


@dataclass(frozen=True)
class Preset:
    """A model and the size of the batches that it is measured with."""

    model: ModelConfig
    tokens_per_rank: int
    batch_size: int = 1


# Each model's values are in the order of SIZES.
PRESETS = {
    "tiny": Preset(ModelConfig(64, 2, 2, 4, 2, 128, 256), tokens_per_rank=256),
    "small": Preset(ModelConfig(512, 4, 2, 8, 4, 1408, 256), tokens_per_rank=1024),
    "h2048": Preset(ModelConfig(2048, 2, 2, 16, 8, 5632, 32768), tokens_per_rank=1024),
    "h4096": Preset(ModelConfig(4096, 4, 2, 32, 8, 11264, 32768), tokens_per_rank=4096),
}
