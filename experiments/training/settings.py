"""What the options of experiments/train.py make of a run."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from harness.activation_options import ActivationOptions
from harness.command import check_least, check_out
from harness.launch import check_environment, check_gpus, choose_device
from overlap_mtp.layout import length_unit
from overlap_mtp.model.config import PRESETS, ModelConfig
from overlap_mtp.schedules import SCHEDULES
from overlap_mtp.training.checkpoint import CheckpointError, Checkpoints
from overlap_mtp.training.data import PACKING, BatchStream, Corpus, open_corpus
from overlap_mtp.training.parallel import ParallelDims
from overlap_mtp.training.trainer import TrainConfig
from training.board import check_tensorboard
from training.curves import LOG
from training.options import DataOptions, ModelOptions, OptimizerOptions, OutputOptions, RankOptions

SHORTEST_DEADLINE_S = 5.0  # starting ranks are silent for seconds
LONGEST_DEADLINE_S = 1e6  # sockets take no longer timeout than 2^31 ms
# Fields of a model that older checkpoints do not name. Their defaults are what these models did.
ADDED = ("mtp_inputs", "hidden_state_mixing", "distillation", "distillation_weight", "distillation_detach")
SHARED_BY = 8  # documents are padded so that 1, 2, 4 and 8 cp ranks see the same batches


@dataclass(frozen=True)
class RunSettings(OutputOptions, DataOptions, ModelOptions, ActivationOptions, OptimizerOptions, RankOptions):
    """A run: its options, and what they make of it."""

    @property
    def folder(self) -> Path:
        return self.out or Path("out/train")

    @property
    def dims(self) -> ParallelDims:
        return ParallelDims(self.dp, 1 if self.cp is None else self.cp, self.tp)

    @property
    def model(self) -> ModelConfig:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        preset = PRESETS[self.preset].model
        return replace(
            preset,
            vocab_size=preset.vocab_size if self.vocab_size is None else self.vocab_size,
            num_depths=self.depths,
            mtp_loss_factor=self.mtp_loss_factor,
            num_experts=self.experts,
            experts_per_token=self.experts_per_token,
            aux_loss_factor=self.aux_loss_factor,
            derive_labels=self.derive_labels,
            detach_mtp=self.detach_mtp,
            repeat_mtp_layer=self.repeat_mtp_layer,
            **{one.name: getattr(self, one.name) for one in fields(ActivationOptions)},
        )

    @property
    def train_config(self) -> TrainConfig:
        return TrainConfig(
            steps=self.steps,
            learning_rate=self.learning_rate,
            warmup_steps=min(20, self.steps) if self.warmup is None else self.warmup,
            clip_norm=self.clip,
            normalisation=self.normalisation,
        )

    def resolved(self) -> RunSettings:
        """Choose the device, the number of ranks and cp, and make the run's folder.

        Raises:
            ValueError: if an option is illegal; no rank has been started yet.
        """
        check_environment()
        device, others = choose_device(self.device), ParallelDims(self.dp, 1, self.tp).world
        ranks = int(os.environ.get("WORLD_SIZE", 0)) or self.ranks or others * (self.cp or 0)
        ranks = ranks or (torch.cuda.device_count() if device == "cuda" else 2 * others)
        check_gpus(ranks, device, self.share_gpus)
        cp = max(1, ranks // others) if self.cp is None else self.cp
        settings = replace(self, device=device, ranks=ranks, cp=cp)
        settings._check(ranks)
        return settings

    def _check(self, ranks: int) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        self.dims.check(self.model, self.seq_len, "zigzag", ranks)
        if self.compile and self.tp > 1:
            raise ValueError(
                f"--compile and tp > 1 do not go together, got tp {self.tp}: leave out one of them"
            )
        check_least(self, accumulate=1, keep=1, save_every=0, profile=0, deadline=SHORTEST_DEADLINE_S)
        _ = self.train_config  # raises if an option is illegal
        for name in ("deadline", "save_deadline"):
            seconds = getattr(self, name)
            if not 0 <= seconds <= LONGEST_DEADLINE_S:  # nor NaN
                raise ValueError(
                    f"--{name.replace('_', '-')} must be in [0, {LONGEST_DEADLINE_S:.0f}], got {seconds}"
                )
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ValueError(f"--peak-tflops must be finite and > 0, got {self.peak_tflops}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be in [0, 2^63 - 1], got {self.seed}")
        self.stream(corpus := self.corpus())
        has_log = (log := self.folder / LOG).exists() and log.stat().st_size
        checkpoints = self.checkpoints()
        if not self.resume and (has_log or checkpoints.latest()):
            raise ValueError(f"{self.folder} holds a run: go on with --resume, or give another --out")
        if (folder := checkpoints.folder).exists() and not folder.is_dir():
            raise ValueError(f"{folder} must be a folder: take it away, or give another --out")
        try:
            step = checkpoints.check(self.identity(corpus)) if self.resume else 0
        except CheckpointError as error:
            raise ValueError(str(error)) from error
        if self.steps < step:
            raise ValueError(
                f"--steps must be at least {step}, the step of the last checkpoint in {folder}, got {self.steps}: give "
                "more steps, or begin a new run in another --out"
            )
        if self.tensorboard:
            check_tensorboard()
        check_out(self.folder, LOG, "run.json", "losses.png", "losses.md")
        if self.profile:
            check_out(self.folder / "profile")

    def checkpoints(self, group: dist.ProcessGroup | None = None) -> Checkpoints:
        """Return the checkpoints of the run. `group` holds all ranks; None if no rank has been started."""
        folder, sizes = self.folder / "checkpoints", asdict(self.dims)
        # The default warm-up follows from the steps.
        names = ["steps"] if self.warmup is not None else ["steps", "warmup_steps"]
        may_differ = tuple(f"train_config.{name}" for name in names)
        if_absent = {one.name: one.default for one in fields(ModelConfig) if one.name in ADDED}
        return Checkpoints(
            folder, self.keep, sizes=sizes, may_differ=may_differ, if_absent=if_absent, group=group
        )

    def corpus(self) -> Corpus:
        return open_corpus(self.data, self.token_dtype)

    def stream(self, corpus: Corpus) -> BatchStream:
        """Return batches of one sequence each, the same for every number of ranks."""
        corpus, vocab_size = corpus.shuffled(self.seed), self.model.vocab_size
        documents, unit = self.documents or None, self._multiple_of
        return BatchStream(corpus, self.seq_len, 1, self.dims.cp, "zigzag", vocab_size, documents, unit)

    @property
    def _multiple_of(self) -> int:
        return length_unit(math.lcm(SHARED_BY, self.dims.cp), "zigzag")

    def shared(self, corpus: Corpus) -> dict[str, Any]:
        """Return what all ranks of a run must share: the options, and what the data is in place of where it is."""
        options = {name: value for name, value in asdict(self).items() if name not in ("data", "curves")}
        return {**options, "data": corpus.fingerprint}

    def identity(self, corpus: Corpus) -> dict[str, Any]:
        """Return what a run must share with a checkpoint to go on from it: model, training and order of the data."""
        training = {f"train_config.{name}": value for name, value in asdict(self.train_config).items()}
        training["dp * accumulate"] = self.dp * self.accumulate
        return {
            **asdict(self.model),
            **training,
            "data": corpus.fingerprint,
            "token_dtype": self.token_dtype,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "num_documents": self.documents or None,
            "documents' lengths are multiples of": self._multiple_of if self.documents else None,
            **({"packing": PACKING} if self.documents else {}),
        }
