"""The HybridModel of Megatron-LM's main branch, of attention and MLP layers, without Transformer Engine."""

from __future__ import annotations

from typing import Any

from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import multi_token_prediction as mtp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules


def hybrid_model(config: Any, spec: ModuleSpec, options: dict[str, Any]) -> HybridModel:
    """A model of two attention layers, an MLP layer after each, and two MTP depths."""
    hybrid_block.TENorm = WrappedTorchNorm  # its final norm is Transformer Engine's, whatever the spec says
    of_layer = spec.submodules
    depth = ModuleSpec(
        module=mtp.MultiTokenPredictionLayer,
        submodules=mtp.MultiTokenPredictionLayerSubmodules(
            enorm=WrappedTorchNorm,
            hnorm=WrappedTorchNorm,
            eh_proj=ColumnParallelLinear,
            mtp_model_layer=None,
            layer_norm=WrappedTorchNorm,
        ),
    )
    attention = TransformerLayerSubmodules(
        input_layernorm=of_layer.input_layernorm,
        self_attention=of_layer.self_attention,
        self_attn_bda=of_layer.self_attn_bda,
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=of_layer.pre_mlp_layernorm, mlp=of_layer.mlp, mlp_bda=of_layer.mlp_bda
    )
    stack = ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
            mtp_block_spec=ModuleSpec(
                module=mtp.MultiTokenPredictionBlock,
                submodules=mtp.MultiTokenPredictionBlockSubmodules(layer_specs=[depth]),
            ),
        ),
    )
    return HybridModel(
        config=config, hybrid_stack_spec=stack, hybrid_layer_pattern="*-*-/*-/*-", **options
    ).train()
