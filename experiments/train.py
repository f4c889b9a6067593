"""Does a model train alike under any sizes and schedule? Trains one on real text and draws its losses.

    python experiments/train.py --out out/run                                     # two CPU ranks, or all GPUs: cp
    torchrun --nproc-per-node 8 experiments/train.py --dp 2 --cp 2 --tp 2 --preset h2048 --out out/run
    python experiments/train.py --out out/run --resume --dp 1 --cp 2 --tp 2       # goes on, at other sizes
    python experiments/train.py --curves out/a --curves out/b --out out/both      # their losses in one picture

The folder holds `steps.jsonl` (a record a step), `run.json`, checkpoints and `losses.png`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from harness.launch import check_gpus, choose_device, run_on_ranks
from overlap_mtp.model.config import PRESETS
from overlap_mtp.training.parallel import ParallelDims
from overlap_mtp.training.trainer import TrainConfig
from training.curves import draw_losses
from training.run import RunSettings, train_on_rank


def main(
    out: Annotated[Path | None, typer.Option(help="The run's folder; default: out/train.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the folder's last checkpoint.")
    ] = False,
    curves: Annotated[
        list[Path] | None, typer.Option(help="Draw these runs into --out, and train none.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Text, a folder of it, or a .bin of token ids.")] = None,
    token_dtype: Annotated[str, typer.Option(help="Of a .bin.")] = "uint16",
    preset: Annotated[str, typer.Option(help="tiny, small, h2048 or h4096.")] = "tiny",
    dp: Annotated[int, typer.Option(help="Ranks that share no sequence.")] = 1,
    cp: Annotated[int | None, typer.Option(help="Ranks that share a sequence; by default the rest.")] = None,
    tp: Annotated[int, typer.Option(help="Ranks that share each tensor.")] = 1,
    ranks: Annotated[int | None, typer.Option(help="Processes to start, where torchrun did not.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    share_gpus: Annotated[bool, typer.Option("--share-gpus", help="Several ranks on a GPU; slow.")] = False,
    schedule: Annotated[str, typer.Option(help="sync, merged, overlap, prefetch or prepared.")] = "prefetch",
    seq_len: Annotated[
        int, typer.Option(help="Tokens of a microbatch's sequence, over all cp ranks.")
    ] = 1024,
    documents: Annotated[int, typer.Option(help="Packed into each sequence; 0: one dense stream.")] = 8,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    accumulate: Annotated[int, typer.Option(help="Microbatches of a rank in a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 1e-3,
    warmup: Annotated[
        int | None, typer.Option(help="Steps to get there; default: 20, or all where there are fewer.")
    ] = None,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradients.")] = 1.0,
    normalisation: Annotated[str, typer.Option(help="Of losses: token or batch.")] = "token",
    mtp_loss_factor: Annotated[float, typer.Option(help="Of the depths' mean loss.")] = 0.3,
    depths: Annotated[int, typer.Option(help="MTP depths.")] = 2,
    experts: Annotated[int, typer.Option(help="Of each inputs-forward layer; 0: none.")] = 0,
    experts_per_token: Annotated[int, typer.Option(help="That a token goes to.")] = 2,
    aux_loss_factor: Annotated[float, typer.Option(help="Of the load-balancing loss.")] = 0.01,
    derive_labels: Annotated[bool, typer.Option("--derive-labels", help="From input_ids.")] = False,
    detach_mtp: Annotated[
        bool, typer.Option("--detach-mtp", help="MTP losses train their block isolated.")
    ] = False,
    repeat_mtp_layer: Annotated[bool, typer.Option("--repeat-mtp-layer", help="One for all depths.")] = False,
    recompute: Annotated[bool, typer.Option("--recompute", help="Keep no activations of layers.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the layers; not with tp.")] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same bits in every run on GPUs; slower.")
    ] = False,
    save_every: Annotated[
        int, typer.Option(help="Steps from one checkpoint to the next; 0: the last only.")
    ] = 100,
    keep: Annotated[int, typer.Option(help="Checkpoints to keep.")] = 3,
    deadline: Annotated[
        float,
        typer.Option(help="Seconds that ranks wait for one another; a quarter of it for a sign of life."),
    ] = 60,
    save_deadline: Annotated[float, typer.Option(help="... while all save or load a checkpoint.")] = 3600,
    seed: Annotated[int, typer.Option(help="Of the first weights and of the order of the documents.")] = 0,
) -> None:
    """Trains a GPT with multi-token prediction; `steps.jsonl` in --out says how it went."""
    if curves:
        try:
            typer.echo(draw_losses(curves, out or Path("out/curves")))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        return
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    try:
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        device = choose_device(device)
        sizes = ParallelDims(dp, 1, tp)
        known = int(os.environ.get("WORLD_SIZE", 0)) or ranks or sizes.world * (cp or 0)
        world = known or (torch.cuda.device_count() if device == "cuda" else 2 * sizes.world)
        check_gpus(world, device, share_gpus)
        config = replace(
            PRESETS[preset].model,
            num_depths=depths,
            mtp_loss_factor=mtp_loss_factor,
            num_experts=experts,
            experts_per_token=experts_per_token,
            aux_loss_factor=aux_loss_factor,
            derive_labels=derive_labels,
            detach_mtp=detach_mtp,
            repeat_mtp_layer=repeat_mtp_layer,
        )
        settings = RunSettings(
            model=config,
            recipe=TrainConfig(
                steps=steps,
                learning_rate=learning_rate,
                warmup_steps=min(20, steps) if warmup is None else warmup,
                clip_norm=clip,
                accumulate=accumulate,
                normalisation=normalisation,  # type: ignore[arg-type]
            ),
            sizes=replace(sizes, cp=max(1, world // sizes.world) if cp is None else cp),
            schedule=schedule,
            seq_len=seq_len,
            num_documents=documents or None,
            out=out or Path("out/train"),
            resume=resume,
            data=data,
            token_dtype=token_dtype,
            recompute=recompute,
            compiled=compiled,
            deterministic=deterministic,
            save_every=save_every,
            keep=keep,
            deadline=timedelta(seconds=deadline),
            save_deadline=timedelta(seconds=save_deadline),
            seed=seed,
        )
        settings.check(world)
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(str(error)) from None
    try:
        run_on_ranks(
            train_on_rank, world, device, settings, deadline=settings.deadline, share_gpus=share_gpus
        )
    except ProcessExitedException as error:  # the ranks that were left have said why
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    except ProcessRaisedException as error:
        said = error.msg.strip().splitlines()[-1]
        if not said.startswith("overlap_mtp."):  # our own errors need no traceback
            raise
        typer.echo(said, err=True)
        raise typer.Exit(1) from None
    except Exception as error:  # of this rank, under torchrun
        kind = type(error)
        if not kind.__module__.startswith("overlap_mtp."):
            raise
        typer.echo(f"{kind.__module__}.{kind.__name__}: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    # Of the ranks: where rank 0 is gone, the others say so in a line, and need no stacks of torch's store.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    typer.run(main)
