"""What does each schedule cost across presets, kinds of documents and directions? Many comparisons in one launch.

    python experiments/sweep.py --out experiments/results/2xH200
    torchrun --nproc-per-node 4 experiments/sweep.py --presets h4096 --documents dense,32 --directions train

Each comparison is one of `compare_modes`, with a record and pictures of its own; `summary.md` has a line for each
schedule of each.
"""

from __future__ import annotations

import gc
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from compare_modes import ALL_MODES, MAX_DOCUMENTS, check_modes, efficiency_of, run_with_progress, stall_of
from rich.console import Console

from compare.comparison import Comparison, Settings
from harness import plots
from harness.launch import run_on_ranks
from overlap_mtp.model.config import PRESETS

DIRECTIONS = {"train": False, "forward": True}


def main(
    presets: Annotated[str, typer.Option(help="Comma-separated.")] = "h2048,h4096",
    documents: Annotated[str, typer.Option(help="`dense` or numbers of packed documents.")] = "dense,8,32",
    directions: Annotated[str, typer.Option(help="train (forward and backward), forward.")] = "train,forward",
    modes: Annotated[str, typer.Option(help="Comma-separated schedules.")] = ",".join(ALL_MODES),
    transport: Annotated[str, typer.Option(help="Where a mode names none.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="As in compare_modes.")] = False,
    captured: Annotated[bool, typer.Option("--graph", help="As in compare_modes.")] = False,
    ranks: Annotated[int | None, typer.Option(min=1)] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    rounds: Annotated[int, typer.Option(min=2)] = 60,
    warmup: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[Path, typer.Option()] = Path("out/sweep"),
) -> None:
    """Compares the schedules in every combination of presets, documents and directions."""
    try:
        world = int(os.environ.get("WORLD_SIZE", 0)) or ranks or torch.cuda.device_count() or 2
        runs = [
            (
                f"{preset}-{kind}-{direction}{'-compile' if compiled else ''}{'-graph' if captured else ''}",
                replace(
                    _settings(preset, kind, direction, modes, world, rounds, warmup),
                    transport=transport,
                    compiled=compiled,
                    captured=captured,
                ),
            )
            for preset in presets.split(",")
            for kind in documents.split(",")
            for direction in directions.split(",")
        ]
        run_on_ranks(sweep_on_rank, world, device, runs, out)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _settings(
    preset: str, documents: str, direction: str, modes: str, world: int, rounds: int, warmup: int
) -> Settings:
    if preset not in PRESETS or direction not in DIRECTIONS:
        raise ValueError(
            f"presets must be among {', '.join(PRESETS)} and directions among {', '.join(DIRECTIONS)}, got "
            f"{preset!r} and {direction!r}"
        )
    chosen = PRESETS[preset]
    return Settings(
        chosen.model,
        check_modes(modes),
        chosen.tokens_per_rank * world,
        chosen.batch_size,
        "zigzag",
        None if documents == "dense" else int(documents),
        MAX_DOCUMENTS if documents == "dense" else max(MAX_DOCUMENTS, int(documents)),
        DIRECTIONS[direction],
        rounds,
        warmup,
        data=None,
        token_dtype="uint16",
    )


def sweep_on_rank(device: torch.device, runs: list[tuple[str, Settings]], out: Path) -> None:
    console = Console(quiet=dist.get_rank() != 0, width=120)
    results = {}
    for name, settings in runs:
        result = run_with_progress(Comparison(settings, device), console)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if result is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
            plots.draw(result, out, f"{name}-")
            results[name] = result
            (out / "summary.md").write_text(markdown_of(results))
            console.print(markdown_of({name: result}), soft_wrap=True)


def markdown_of(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table with a line for each schedule of each comparison."""
    columns = [
        "run",
        "schedule",
        "step ms",
        "/ prepared [95 %]",
        "step delta µs [95 %]",
        "stall_estimate µs [95 %]",
    ]
    columns += ["efficiency", "host µs", "sent", "same"]
    lines = [f"| {' | '.join(columns)} |", "|" + len(columns) * "---|"]
    for name, result in results.items():
        for mode, row in result["rows"].items():
            ratio, exposed = row["ratio"], row["step_delta_us"]
            same = row["rolls_equal"] and row["loss_equal"]
            lines.append(
                f"| {name} | {mode} | {row['median_ms']:.2f} "
                f"| {ratio['value']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}] "
                f"| {exposed['value']:.0f} [{exposed['low']:.0f}, {exposed['high']:.0f}] "
                f"| {stall_of(row)} | {efficiency_of(mode, row)} "
                f"| {row['host_us']:.0f} | {row['messages_per_step']:.0f} "
                f"| {'-' if mode == 'none' else 'yes' if same else 'NO'} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
