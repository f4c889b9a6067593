"""The multi-token prediction block, for any model that has an embedding, hidden states and a layer to repeat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.schedules import Roller, Rolls, make_roller
from overlap_mtp.tracing import span


class Recomputed(nn.Module):
    """A module that computes `_forward`. With `recompute`, backward computes it again: no activations are kept."""

    recompute = False
    _forward: Callable[..., Any]

    def forward(self, *arguments: Any) -> Any:
        if not (self.recompute and torch.is_grad_enabled()):
            return self._forward(*arguments)
        # The layers draw no random numbers, so there is no random state to restore.
        return checkpoint(self._forward, *arguments, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True)
class Prediction:
    """The inputs of one depth's loss."""

    depth: int
    hidden: torch.Tensor  # [B, L, hidden], normalised: the input of the output head
    tokens: dict[str, torch.Tensor]  # labels, loss_mask, ... rolled by depth
    extra: Any = None  # the second value that the layer returned, if it returned one


class MultiTokenPrediction(nn.Module):
    """Predict one token further at each of D depths (DeepSeek-V3, arXiv 2412.19437, section 2.2).

    Depth k merges the hidden states of depth k - 1 with the embedding of the tokens k ahead and runs one layer:
    h_k = layer(eh_proj([enorm(embed(roll_k(input_ids))), hnorm(h_{k-1})])). The embedding and the output head belong
    to the model.

        rolls = mtp.start(batch, layout)                   # before the trunk, or early in it
        hidden = trunk(batch)
        for p in mtp(hidden, rolls, embedding, *layer_arguments):
            loss += cross_entropy(head(p.hidden), p.tokens["labels"], p.tokens["loss_mask"])
        ...
        mtp.roller.close()                                 # after the last step

    Args:
        hidden_size: the width of the hidden states.
        num_depths: D.
        make_layer: returns the layer of a depth (1 .. D). The layer is called as layer(hidden, *layer_arguments) and
            returns hidden states, or a tuple of hidden states and one other value.
        cp_group: the ranks that share the sequence; None if this rank holds all of it.
        schedule, transport, max_documents: as in `make_roller`.
        norm_eps: the epsilon of the RMS norms.
        repeat_layer: use the same parameters for all depths.
        detach: let the losses of the depths train this block only, not the trunk and the embedding.
        derive_labels: take labels from the ids that follow. The batch then has no labels, and ids are rolled one
            depth further in the same message.

    Raises:
        ValueError: if `make_roller` refuses the schedule, the transport or a size.
    """

    def __init__(
        self,
        hidden_size: int,
        num_depths: int,
        make_layer: Callable[[int], nn.Module],
        *,
        cp_group: dist.ProcessGroup | None = None,
        schedule: str = "prefetch",
        transport: str = "auto",
        max_documents: int = 128,
        norm_eps: float = 1e-5,
        repeat_layer: bool = False,
        detach: bool = False,
        derive_labels: bool = False,
    ) -> None:
        super().__init__()
        self.num_depths, self.detach, self.derive_labels = num_depths, detach, derive_labels
        self.roller: Roller = make_roller(
            schedule, cp_group, num_depths + derive_labels, transport, max_documents
        )
        self.depths = nn.ModuleList(
            MTPDepth(hidden_size, make_layer(depth), norm_eps)
            for depth in range(1, 2 if repeat_layer else num_depths + 1)
        )

    def start(
        self, batch: Mapping[str, torch.Tensor], layout: SequenceLayout, ready: torch.cuda.Event | None = None
    ) -> Rolls:
        """Start the exchange of this rank's batch.

        Call it before the trunk, or after launching the trunk's first layer: the GPU then works on that layer while
        the host starts the exchange.

        Args:
            batch: this rank's tensors by name, [B, L] each.
            layout: the layout of the batch.
            ready: as in `Roller.start`.

        Returns:
            The rolls, for `forward`.

        Raises:
            ValueError: as `Roller.start` does.
        """
        return self.roller.start(batch, layout, ready)

    def forward(
        self,
        hidden: torch.Tensor,
        rolls: Rolls,
        embed: Callable[[torch.Tensor], torch.Tensor],
        *layer_arguments: Any,
    ) -> list[Prediction]:
        """Run all depths.

        Args:
            hidden: the trunk's hidden states before its final norm, [B, L, hidden].
            rolls: what `start` returned.
            embed: maps ids [B, L] to embeddings [B, L, hidden].
            *layer_arguments: passed to each layer.

        Returns:
            The predictions of depths 1 .. D.
        """
        predictions = []
        if self.detach:
            hidden = hidden.detach()
        for depth in range(1, self.num_depths + 1):
            block = self.depths[min(depth, len(self.depths)) - 1]
            with span("depth", depth, depth=depth):
                tokens = rolls.at(depth)
                if self.derive_labels:
                    tokens["labels"] = rolls.at(depth + 1)["input_ids"]
                embedded = embed(tokens["input_ids"])
                if self.detach:
                    embedded = embedded.detach()
                hidden, normed, extra = block(hidden, embedded, *layer_arguments)
            predictions.append(Prediction(depth, normed, tokens, extra))
        return predictions


class MTPDepth(Recomputed):
    """One depth: return hidden states for the next depth, the same normalised for the head, and the layer's extra."""

    def __init__(self, hidden_size: int, layer: nn.Module, norm_eps: float) -> None:
        super().__init__()
        self.enorm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.hnorm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.layer = layer
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)

    def _forward(
        self, hidden: torch.Tensor, embedded: torch.Tensor, *layer_arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        merged = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        out = self.layer(merged, *layer_arguments)
        hidden, extra = out if isinstance(out, tuple) else (out, None)
        return hidden, self.norm(hidden), extra
