"""The model's sizes, and the presets that figures are compared on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """A decoder with `num_layers` trunk layers and `num_depths` MTP depths (one layer each)."""

    hidden_size: int
    num_layers: int
    num_depths: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int  # inner width of SwiGLU
    vocab_size: int
    mtp_loss_factor: float = 0.3  # DeepSeek-V3, arXiv 2412.19437, section 4.2
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    repeat_mtp_layer: bool = False  # one MTP layer for all depths
    detach_mtp: bool = False  # MTP losses train the MTP block alone
    derive_labels: bool = False  # labels are the ids that follow
    num_experts: int = 0  # of every feed-forward layer; 0: one SwiGLU, no router
    experts_per_token: int = 2
    aux_loss_factor: float = 0.01  # of the mean over layers

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "num_layers",
            "num_depths",
            "num_heads",
            "num_kv_heads",
            "ffn_size",
            "vocab_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size must be a multiple of 2 * num_heads = {2 * self.num_heads} (rotary embedding turns "
                f"pairs), got {self.hidden_size}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads = {self.num_kv_heads}, got {self.num_heads}"
            )
        for name in ("mtp_loss_factor", "aux_loss_factor"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and > 0, got {getattr(self, name)}")
        if self.num_experts < 0:
            raise ValueError(f"num_experts must be >= 0, got {self.num_experts}")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token must be in [1, num_experts = {self.num_experts}], got {self.experts_per_token}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def depths_rolled(self) -> int:
        """How far the batch is rolled: one further where the rolls give the labels too."""
        return self.num_depths + self.derive_labels

    @property
    def num_sums(self) -> int:
        """Losses that GPT.forward gives: LM, each MTP depth, and with experts the load-balancing one."""
        return 1 + self.num_depths + bool(self.num_experts)


@dataclass(frozen=True)
class Preset:
    """A model and the batch that it is measured with."""

    model: ModelConfig
    batch_size: int
    tokens_per_rank: int


PRESETS = {
    "tiny": Preset(
        ModelConfig(
            hidden_size=64,
            num_layers=2,
            num_depths=2,
            num_heads=4,
            num_kv_heads=2,
            ffn_size=128,
            vocab_size=256,
        ),
        batch_size=1,
        tokens_per_rank=256,
    ),
    "small": Preset(
        ModelConfig(
            hidden_size=512,
            num_layers=4,
            num_depths=2,
            num_heads=8,
            num_kv_heads=4,
            ffn_size=1408,
            vocab_size=256,
        ),
        batch_size=1,
        tokens_per_rank=1024,
    ),
    "h2048": Preset(
        ModelConfig(
            hidden_size=2048,
            num_layers=2,
            num_depths=2,
            num_heads=16,
            num_kv_heads=8,
            ffn_size=5632,
            vocab_size=32768,
        ),
        batch_size=1,
        tokens_per_rank=1024,
    ),
    "h4096": Preset(
        ModelConfig(
            hidden_size=4096,
            num_layers=4,
            num_depths=2,
            num_heads=32,
            num_kv_heads=8,
            ffn_size=11264,
            vocab_size=32768,
        ),
        batch_size=1,
        tokens_per_rank=4096,
    ),
}
