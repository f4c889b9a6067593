"""The options of experiments/train.py, in the groups that `--help` shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import UseAppendAction

from harness.command import default_is
from overlap_mtp.training.trainer import Normalisation


@dataclass(frozen=True)
class OutputOptions:
    """Where a run is written to, and what is done there."""

    out: Annotated[Path | None, default_is("out/train, or out/curves for --curves")] = None
    """The run's folder."""
    resume: bool = False
    """Go on from the folder's last checkpoint."""
    curves: UseAppendAction[tuple[Path, ...]] = ()
    """Draw the losses of this run into --out, and train none."""
    save_every: int = 100
    """Steps from one checkpoint to the next; 0: save the last step only."""
    keep: int = 3
    """Checkpoints to keep."""
    profile: int = 0
    """Steps to record on every rank with torch.profiler, after two others; 0: none. profiles/report.py reads those of
    GPUs."""
    tensorboard: bool = False
    """Write the records as TensorBoard's event files, too."""


@dataclass(frozen=True)
class DataOptions:
    """What a run learns from."""

    data: Annotated[Path | None, default_is("the source of Python's library")] = None
    """A text file, token ids (.bin, also of llm.c, or a 1-D .npy), or a folder of text or of such files."""
    token_dtype: Literal["uint16", "uint32"] = "uint16"
    """Of the ids in a .bin."""
    seq_len: int = 1024
    """Tokens of the whole sequence, over all cp ranks."""
    documents: int = 8
    """Documents packed into a sequence; 0: one dense stream."""


@dataclass(frozen=True)
class ModelOptions:
    """What learns."""

    preset: str = "tiny"
    """The model's size: tiny, small, h2048 or h4096."""
    vocab_size: Annotated[int | None, default_is("the preset's")] = None
    """Token ids of the model; the bytes of a text need 256."""
    depths: int = 2
    """MTP layers, which are the depths to roll to."""
    experts: int = 0
    """Experts of each feed-forward layer; 0: none."""
    experts_per_token: int = 2
    """Experts that a token goes to."""
    derive_labels: bool = False
    """Take labels from input_ids."""
    detach_mtp: bool = False
    """Let MTP losses train the MTP block only."""
    repeat_mtp_layer: bool = False
    """Use one MTP layer for all depths."""


@dataclass(frozen=True)
class OptimizerOptions:
    """How it learns."""

    steps: int = 200
    """Optimizer steps of the whole run. --resume may give more: the learning rate then follows them."""
    accumulate: int = 1
    """Microbatches of a rank in a step."""
    learning_rate: float = 1e-3
    """The highest learning rate."""
    warmup: Annotated[int | None, default_is("20, or all if there are fewer")] = None
    """Steps to reach the highest learning rate."""
    clip: float = 1.0
    """Largest norm of the gradients."""
    normalisation: Normalisation = "token"
    """Divide losses by the tokens of the step, or of each batch."""
    mtp_loss_factor: float = 0.3
    """Weight of the mean loss of the MTP depths."""
    aux_loss_factor: float = 0.01
    """Weight of the load-balancing loss of experts."""
    seed: int = 0
    """Of the first weights and of the order of the documents."""


@dataclass(frozen=True)
class RankOptions:
    """What the ranks share, and how they compute."""

    dp: int = 1
    """Ranks that share no sequence."""
    cp: Annotated[int | None, default_is("all that dp and tp leave")] = None
    """Ranks that share a sequence."""
    tp: int = 1
    """Ranks that share each tensor."""
    ranks: Annotated[int | None, default_is("torchrun's; else one for each GPU, or two on CPU")] = None
    """Ranks to start."""
    device: Annotated[Literal["cuda", "cpu"] | None, default_is("cuda if there is a GPU")] = None
    """What the ranks run on."""
    share_gpus: bool = False
    """Allow several ranks on a GPU, which is slow."""
    schedule: str = "prefetch"
    """When the boundary exchange's messages leave: sync, merged, batched, overlap, prefetch or
    prepared."""
    activation_schedule: Literal["sync", "merged", "overlap"] = "overlap"
    """When the messages of rolled activations leave."""
    recompute: bool = False
    """Keep no activations of layers; compute them again in backward."""
    compile: bool = False
    """Compile the layers; not with tp."""
    peak_tflops: Annotated[float | None, default_is("known for H100 and H200 (SXM, dense bf16)")] = None
    """TFLOP/s that a GPU could reach, for MFU."""
    deterministic: bool = False
    """Give the same bits in every run on GPUs, which is slower."""
    deadline: float = 60
    """Seconds that ranks wait for one another; for a silent rank a quarter of them."""
    save_deadline: float = 3600
    """Seconds that ranks wait for one another while they save or load."""
