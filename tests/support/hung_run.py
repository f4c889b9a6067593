"""experiments/train.py, but rank 1 is late and then stops for ever, in the function that HANGS_IN names; it lives."""

from __future__ import annotations

import os
import time

import torch.distributed as dist
from train import main

from overlap_mtp.model.decoder import DecoderLayer
from overlap_mtp.model.gpt import GPT

# Seconds by call. A microbatch has four layers, two of them MTP, and three losses.
OWNER, NAME, STOPS = {
    "first layer": (DecoderLayer, "_forward", {1: 1000}),
    "layer": (DecoderLayer, "_forward", {1: 5.5, 6: 1000}),
    "loss": (GPT, "_loss_sum", {1: 5.5, 4: 1000}),
}[os.environ["HANGS_IN"]]

compute, calls = getattr(OWNER, NAME), 0


def stopping(self, *arguments):
    global calls
    calls += 1
    if calls in STOPS and dist.get_rank() == 1:
        if STOPS[calls] > 100:
            print("here", flush=True)
        time.sleep(STOPS[calls])
    return compute(self, *arguments)


setattr(OWNER, NAME, stopping)  # in the ranks too, which import this file

if __name__ == "__main__":
    main()
