"""The multi-token prediction block, for any model that has an embedding, hidden states and a layer to repeat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.model.recompute import recomputed
from overlap_mtp.schedules import Roller, Rolls, make_roller
from overlap_mtp.tracing import span


@dataclass(frozen=True)
class Prediction:
    """What depth k predicts from: its normalised hidden states and the tokens rolled by k."""

    depth: int
    hidden: torch.Tensor  # [B, L, hidden], ready for the output head
    tokens: dict[str, torch.Tensor]  # labels, loss_mask, ... rolled by depth
    extra: Any = None  # what the layer returned besides hidden states


class MultiTokenPrediction(nn.Module):
    """D depths that each predict one token further (DeepSeek-V3, arXiv 2412.19437, section 2.2).

    Depth k merges the hidden states of depth k - 1 with the embedding of the tokens k ahead and runs one layer:
    h_k = layer(eh_proj([enorm(embed(roll_k(input_ids))), hnorm(h_{k-1})])). Embedding and output head are the
    model's own.

        rolls = mtp.start(batch, layout)                   # before the trunk, or early in it
        hidden = trunk(batch)
        for p in mtp(hidden, rolls, embedding, *layer_arguments):
            loss += cross_entropy(head(p.hidden), p.tokens["labels"], p.tokens["loss_mask"])
        ...
        mtp.roller.close()                                 # at the end of all steps

    `make_layer(depth)` gives the layer of a depth, called as layer(hidden, *layer_arguments): it returns hidden
    states, or a tuple of them and something of its own. `cp_group` are the ranks that share the sequence; None
    where this rank holds all of it. `schedule`, `transport` and `max_documents` are those of `make_roller`.
    `repeat_layer`: one set of parameters for all depths. `detach`: the losses of the depths train this block alone,
    not what it is given. `derive_labels`: the batch has no labels, they are the ids that follow, rolled one depth
    further in the same message.
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
        self,
        batch: Mapping[str, torch.Tensor],
        layout: SequenceLayout,
        ready: torch.cuda.Event | None = None,
    ) -> Rolls:
        """Starts the exchange of this rank's `batch` ([B, L] each).

        Call it before the trunk, or behind its first layer's launches: those then hide the host time of starting.
        `ready` as in Roller.start.
        """
        return self.roller.start(batch, layout, ready)

    def forward(
        self,
        hidden: torch.Tensor,
        rolls: Rolls,
        embed: Callable[[torch.Tensor], torch.Tensor],
        *layer_arguments: Any,
    ) -> list[Prediction]:
        """The predictions of depths 1 .. D, from the trunk's hidden states [B, L, hidden] before its norm."""
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


class MTPDepth(nn.Module):
    """One depth: gives the next depth's hidden states, the same normalised for the output head, and what else its
    layer gives. With `recompute` the backward pass computes it all again, from rolls that are kept."""

    def __init__(self, hidden_size: int, layer: nn.Module, norm_eps: float) -> None:
        super().__init__()
        self.enorm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.hnorm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.layer = layer
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.recompute = False

    def forward(
        self, hidden: torch.Tensor, embedded: torch.Tensor, *layer_arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        return recomputed(self._forward, self.recompute)(hidden, embedded, *layer_arguments)

    def _forward(
        self, hidden: torch.Tensor, embedded: torch.Tensor, *layer_arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        merged = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        out = self.layer(merged, *layer_arguments)
        hidden, extra = out if isinstance(out, tuple) else (out, None)
        return hidden, self.norm(hidden), extra
