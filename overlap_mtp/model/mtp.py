"""The multi-token prediction block, for any model that has an embedding, hidden states and a layer to repeat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.model.activations import ActivationRollers, RolledRows
from overlap_mtp.model.mixing import MixingChoice, StateMixer
from overlap_mtp.schedules import Roller, Rolls, make_roller
from overlap_mtp.schedules.timed import TimedRoller
from overlap_mtp.tensors import IGNORE_INDEX, upload
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
        mtp.close()                                        # after the last step

    Two uses of rolled activations are optional. Their gradients travel back to the rank that owns the row.

    - Inputs that are no ids, such as embeddings with an image in them: `start_embeddings` rolls the embeddings
      themselves, and `forward` takes what it returns in place of `embedding`.
    - `mix_hidden_states` (`overlap_mtp.model.mixing`): in training, h_{k-1} is mixed with the states of all earlier
      depths. `forward` then needs the layout and a key for each row.

    If tensor-parallel ranks share the tokens of a cp rank, set `mtp.activations.tp_group` before the first step.

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
        ignore_index: as in `make_roller`. Derived labels hold it past the end of a document, too.
        mix_hidden_states: mix the inputs of depths 2 .. D in training.
        activation_schedule: as `schedule` in `make_activation_roller`.

    Raises:
        ValueError: if `make_roller` refuses the schedule, the transport or a size, if the schedule of activations is
            unknown, or if labels are derived and `ignore_index` could be an id.
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
        ignore_index: int = IGNORE_INDEX,
        mix_hidden_states: bool = False,
        activation_schedule: str = "overlap",
    ) -> None:
        super().__init__()
        if derive_labels and ignore_index >= 0:
            raise ValueError(f"ignore_index must be < 0 if labels are derived, got {ignore_index}")
        self.num_depths, self.detach, self.derive_labels = num_depths, detach, derive_labels
        self.mix_hidden_states = mix_hidden_states
        self.cp_rank = 0 if cp_group is None else cp_group.rank()
        self.roller: Roller = make_roller(
            schedule, cp_group, num_depths + derive_labels, transport, max_documents, ignore_index
        )
        self.activations = ActivationRollers(activation_schedule, cp_group, max_documents, transport)
        self.depths = nn.ModuleList(
            MTPDepth(hidden_size, make_layer(depth), norm_eps)
            for depth in range(1, 2 if repeat_layer else num_depths + 1)
        )

    def start(
        self,
        batch: Mapping[str, torch.Tensor],
        layout: SequenceLayout,
        ready: torch.cuda.Event | None = None,
        roller: Roller | TimedRoller | None = None,
    ) -> Rolls:
        """Start the exchange of this rank's batch.

        Call it before the trunk, or better after launching half of it: then the host is usually ahead of the GPU, which
        works on while the host starts the exchange.

        Args:
            batch: this rank's tensors by name, [B, L] each.
            layout: the layout of the batch.
            ready: as in `Roller.start`.
            roller: starts the exchange; by default the block's own roller.

        Returns:
            The rolls, for `forward`. If labels are derived, they hold the labels of each depth, from 0 on.

        Raises:
            ValueError: as `Roller.start` does.
        """
        rolls = (roller or self.roller).start(batch, layout, ready)
        if not self.derive_labels:
            return rolls
        return LabelledRolls(rolls, layout, self.cp_rank, self.num_depths, self.roller.ignore_index)

    def start_embeddings(self, embeddings: torch.Tensor, layout: SequenceLayout) -> RolledRows:
        """Start the exchange of embeddings, for depths that take them instead of ids.

        Call it after launching half of the trunk: then the host is usually ahead of the GPU, which works on while the
        host starts the exchange. It lies under the rest of the trunk. Depth 1 joins it.

        Args:
            embeddings: of this rank's tokens, [B, L, hidden].
            layout: the layout of the batch.

        Returns:
            The rolls, for `forward`. Rows past the end of a document are 0.

        Raises:
            ValueError: as `Roller.start` does.
        """
        if self.detach:
            embeddings = embeddings.detach()
        return self.activations.start("embeddings", embeddings, self.num_depths, layout)

    def forward(
        self,
        hidden: torch.Tensor,
        rolls: Rolls,
        embed: Callable[[torch.Tensor], torch.Tensor] | RolledRows,
        *layer_arguments: Any,
        by_depth: Sequence[Any] | None = None,
        layout: SequenceLayout | None = None,
        mixing_keys: torch.Tensor | None = None,
    ) -> list[Prediction]:
        """Run all depths.

        Args:
            hidden: the trunk's hidden states before its final norm, [B, L, hidden].
            rolls: what `start` returned.
            embed: maps ids [B, L] to embeddings [B, L, hidden]; or what `start_embeddings` returned.
            *layer_arguments: passed to each layer.
            by_depth: one more argument for the layer of each depth, passed last: [D].
            layout: the layout of the batch; needed if hidden states are mixed.
            mixing_keys: int64 [B], from which the choices of the mixing follow. The same on all ranks that share a row.

        Returns:
            The predictions of depths 1 .. D.

        Raises:
            ValueError: if hidden states are mixed and the layout or the keys are missing.
        """
        predictions = []
        if self.detach:
            hidden = hidden.detach()
        mixer = self._new_mixer(layout, mixing_keys) if self.mix_hidden_states and self.training else None
        for depth in range(1, self.num_depths + 1):
            block = self.depths[min(depth, len(self.depths)) - 1]
            with span("depth", depth, depth=depth):
                tokens = rolls.at(depth)
                # Before the embedding, whose gradient is many short kernels: in backward, rows leave after these.
                if mixer is not None:
                    hidden = mixer.input_of(depth, hidden)
                embedded = embed.at(depth) if isinstance(embed, RolledRows) else embed(tokens["input_ids"])
                if self.detach:
                    embedded = embedded.detach()
                own = () if by_depth is None else (by_depth[depth - 1],)
                hidden, normed, extra = block(hidden, embedded, *layer_arguments, *own)
            predictions.append(Prediction(depth, normed, tokens, extra))
        return predictions

    def _new_mixer(self, layout: SequenceLayout | None, keys: torch.Tensor | None) -> StateMixer:
        if layout is None or keys is None:
            raise ValueError("mix_hidden_states needs the layout of the batch and mixing_keys")
        choice = MixingChoice(keys, layout, self.cp_rank, self.activations.tp)
        return StateMixer(choice, self.activations, layout, self.num_depths)

    def raise_if_failed(self) -> None:
        """Raise RuntimeError if an exchange failed (`Roller.raise_if_failed`). It never waits."""
        for roller in (self.roller, *self.activations):
            roller.raise_if_failed()

    def close(self) -> None:
        """Free the buffers of all exchanges (`Roller.close`)."""
        for roller in (self.roller, *self.activations):
            roller.close()


class LabelledRolls(Rolls):
    """Rolls of a batch without labels, and the labels of each depth: the ids that follow."""

    def __init__(
        self, rolls: Rolls, layout: SequenceLayout, cp_rank: int, num_depths: int, ignore_index: int
    ) -> None:
        self._rolls, self._layout, self._cp_rank = rolls, layout, cp_rank
        self._num_depths, self._ignore_index = num_depths, ignore_index
        self._missing: torch.Tensor | None = None  # bool [1 + num_depths, L], on the ids' device

    def at(self, depth: int) -> dict[str, torch.Tensor]:
        """As Rolls.at, with `labels`. Depth 0 holds the labels alone."""
        tokens = self._rolls.at(depth) if depth else {}
        ids = self._rolls.at(depth + 1)["input_ids"].long()
        if self._missing is None:
            self._missing = self._find_missing(ids.device)
        tokens["labels"] = ids.masked_fill(self._missing[depth], self._ignore_index)
        return tokens

    def set_replay_layout(self, layout: SequenceLayout) -> None:
        self._rolls.set_replay_layout(layout)
        self._layout = layout
        if self._missing is not None:
            self._missing.copy_(self._find_missing(self._missing.device))

    def _find_missing(self, device: torch.device) -> torch.Tensor:
        depths = range(1, self._num_depths + 2)
        return upload(~np.stack([self._layout.valid(self._cp_rank, depth) for depth in depths]), device)


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
