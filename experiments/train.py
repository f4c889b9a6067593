"""Does a model learn the same at any parallel dimensions and schedule? Train it on real text and draw its losses.

    python experiments/train.py --out out/run                                     # two CPU ranks, or all GPUs: cp
    torchrun --nproc-per-node 8 experiments/train.py --dp 2 --cp 2 --tp 2 --preset h2048 --out out/run
    python experiments/train.py --out out/run --resume --dp 1 --cp 2 --tp 2       # goes on, at other dimensions
    python experiments/train.py --curves out/a --curves out/b --out out/both      # their losses in one picture

The folder holds `steps.jsonl` (one record per step), `run.json`, checkpoints and `losses.png`.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

from harness.signals import INTERRUPTED, STOPPING, hold, release, set_interrupts

if __name__ == "__main__":  # before imports that take seconds
    set_interrupts(signal.default_int_handler, signal.SIG_DFL)  # Ctrl-C prints no traceback of an import
    hold(STOPPING)  # until `run_on_ranks`

from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from harness.command import parse_options, usage_errors
from harness.launch import run_on_ranks
from training.curves import draw_losses
from training.run import train_on_rank
from training.settings import RunSettings


def main() -> None:
    settings = parse_options(
        RunSettings, "Train a GPT with multi-token prediction; --out gets a log of its steps."
    )
    with usage_errors():
        if settings.curves:
            release(STOPPING)
            out = settings.out or Path("out/curves")
            print(draw_losses(list(settings.curves), out))
            print(f"wrote {out / 'losses.png'} and {out / 'losses.md'}")
            return
        settings = settings.resolved()
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    try:
        run_on_ranks(
            train_on_rank,
            settings.ranks,
            settings.device,
            settings,
            deadline=timedelta(seconds=settings.deadline),
            share_gpus=settings.share_gpus,
        )
    except ProcessExitedException as error:  # the other ranks have said why
        sys.exit(str(error))
    except Exception as error:
        if isinstance(error, ProcessRaisedException):
            line = error.msg.strip().splitlines()[-1]
        else:  # of this rank, under torchrun
            line = f"{type(error).__module__}.{type(error).__name__}: {error}"
        if not line.startswith("overlap_mtp."):  # our own errors need no traceback
            raise
        sys.exit(line)


if __name__ == "__main__":
    # If rank 0 is gone, the other ranks say so in one line; the stacks of torch's store add nothing.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        set_interrupts(signal.SIG_DFL, signal.default_int_handler)
        main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
