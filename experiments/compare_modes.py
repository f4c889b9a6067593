"""What does the boundary exchange cost under each schedule, and do all schedules compute the same?

    make compare                                                  (two CPU ranks, or all GPUs)
    python experiments/compare_modes.py --preset h4096 --documents packed --num-documents 32
    torchrun --nproc-per-node 8 experiments/compare_modes.py --preset h4096

Every round runs one step of each schedule on the same weights and batch, then one update. A step is forward and
backward, without optimizer and gradient reduction, and builds and uploads the plan of its batch. Writes
`results.json` and two pictures into `--out`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from compare.comparison import BASELINE, TIMING_ONLY, Comparison, Settings, open_stream
from harness import plots
from harness.launch import choose_device, run_on_ranks
from overlap_mtp import SCHEDULES
from overlap_mtp.exchange.select import TRANSPORTS
from overlap_mtp.model.config import PRESETS

MAX_DOCUMENTS = 128  # what messages are sized for: the default of make_roller
CAPTION = (
    "median [95 % interval]; exposed = step - prepared step; stall_estimate: the same by CUDA events, on one rank's "
    "stream; messages and KB of all ranks together"
)
WIDTH = 190  # of the table where there is no terminal
ALL_MODES = (*SCHEDULES, TIMING_ONLY)
Documents = StrEnum("Documents", ["dense", "packed"])
LayoutKind = StrEnum("LayoutKind", ["zigzag", "contiguous"])
Size = Annotated[int | None, typer.Option(min=1, help="Overrides the preset.")]


def main(
    preset: Annotated[
        str | None, typer.Option(help=f"{', '.join(PRESETS)}; default tiny on CPU, else h2048.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Default: all GPUs, else 2 CPU ranks.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    modes: Annotated[
        str, typer.Option(help="Comma-separated schedules; `prefetch:process_group` names a transport too.")
    ] = ",".join(ALL_MODES),
    depths: Size = None,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the whole sequence, over all ranks.")
    ] = None,
    batch_size: Size = None,
    documents: Documents = Documents.dense,
    num_documents: Annotated[int, typer.Option(min=1, help="Documents in a packed batch.")] = 8,
    layout: LayoutKind = LayoutKind.zigzag,
    hidden_size: Size = None,
    num_layers: Size = None,
    num_heads: Size = None,
    num_kv_heads: Size = None,
    ffn_size: Size = None,
    vocab_size: Size = None,
    forward_only: Annotated[bool, typer.Option("--forward-only", help="No backward, no update.")] = False,
    transport: Annotated[str, typer.Option(help=f"{', '.join(TRANSPORTS)}.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the layers.")] = False,
    captured: Annotated[bool, typer.Option("--graph", help="Replay steps as CUDA graphs; dense.")] = False,
    profile: Annotated[
        str | None, typer.Option(help="nsys: tell it when to listen; torch: write traces.")
    ] = None,
    profile_out: Annotated[Path, typer.Option(help="Where traces go.")] = Path("out/profile"),
    rounds: Annotated[int, typer.Option(min=2, help="Timed rounds.")] = 40,
    warmup: Annotated[int, typer.Option(min=1, help="Rounds before them.")] = 5,
    data: Annotated[
        Path | None,
        typer.Option(help="Text file, folder, or .bin of ids; default: the standard library's source."),
    ] = None,
    token_dtype: Annotated[str, typer.Option(help="Of a .bin: uint16 or uint32.")] = "uint16",
    out: Annotated[Path, typer.Option(help="Where the record and the pictures go.")] = Path("out/compare"),
) -> None:
    """Compares the schedules of the MTP boundary exchange in interleaved training steps on real text."""
    try:
        on_gpu = choose_device(device) == "cuda"
        name = preset or ("h2048" if on_gpu else "tiny")
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        world = int(os.environ.get("WORLD_SIZE", 0)) or ranks or (torch.cuda.device_count() if on_gpu else 2)
        sizes: dict[str, Any] = {
            "num_depths": depths,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "ffn_size": ffn_size,
            "vocab_size": vocab_size,
        }
        chosen = PRESETS[name]
        settings = Settings(
            replace(chosen.model, **{key: value for key, value in sizes.items() if value is not None}),
            check_modes(modes),
            seq_len or chosen.tokens_per_rank * world,
            batch_size or chosen.batch_size,
            layout.value,  # type: ignore[arg-type]
            num_documents if documents is Documents.packed else None,
            max(MAX_DOCUMENTS, num_documents),
            forward_only,
            rounds,
            warmup,
            data,
            token_dtype,
            transport,
            compiled,
            captured,
            profile_out if profile == "torch" else None,
            profile == "nsys",
        )
        check_settings(settings, profile, on_gpu)
        open_stream(settings, world).batch(0)  # what is wrong with sizes or data is said before ranks start
        run_on_ranks(compare_on_rank, ranks, device, settings, out)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def check_settings(settings: Settings, profile: str | None, on_gpu: bool) -> None:
    """Raises ValueError where options do not go together."""
    if settings.transport not in TRANSPORTS:
        raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {settings.transport!r}")
    if profile not in (None, "nsys", "torch"):
        raise ValueError(f"profile must be nsys or torch, got {profile!r}")
    if not on_gpu and (settings.captured or profile or settings.transport == "symmetric"):
        raise ValueError("--graph, --profile and --transport symmetric need GPUs")
    if settings.captured and settings.num_documents is not None:
        raise ValueError("--graph needs --documents dense: the layout of a captured step is fixed")


def check_modes(modes: str) -> tuple[str, ...]:
    """The schedules of a comma-separated list; `prepared`, the floor, is always among them."""
    chosen = tuple(dict.fromkeys(mode.strip() for mode in modes.split(",") if mode.strip()))
    for mode in chosen:
        schedule, _, transport = mode.partition(":")
        if schedule not in ALL_MODES or transport not in ("", *TRANSPORTS):
            raise ValueError(
                f"modes must be among {', '.join(ALL_MODES)}, with :process_group or :symmetric behind them or not, "
                f"got {mode!r}"
            )
    return chosen if BASELINE in chosen else (*chosen, BASELINE)


def compare_on_rank(device: torch.device, settings: Settings, out: Path) -> None:
    """One rank of the comparison; rank 0 shows progress, prints the table and writes the record."""
    first = dist.get_rank() == 0
    console = Console(quiet=not first, width=None if sys.stdout.isatty() else WIDTH)
    result = run_with_progress(Comparison(settings, device), console)
    if result is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
        paths = [out / "results.json", *plots.draw(result, out)]
        console.print(table_of(result))
        console.print("wrote " + ", ".join(str(path) for path in paths), soft_wrap=True)


def run_with_progress(comparison: Comparison, console: Console) -> dict[str, Any] | None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console.quiet) as progress:
        total = comparison.settings.warmup + comparison.settings.rounds
        task = progress.add_task(f"rounds of {', '.join(comparison.settings.modes)}", total=total)
        return comparison.run(lambda: progress.advance(task))


def table_of(result: dict[str, Any]) -> Table:
    """The record as a table."""
    table = Table(
        title=plots.caption(result),
        caption=CAPTION,
    )
    for heading in (
        "schedule",
        "step ms (p10-p90)",
        "/ prepared",
        "step delta µs",
        "stall_estimate µs",
        "efficiency",
        "tokens/s",
    ):
        table.add_column(heading, justify="left" if heading == "schedule" else "right")
    for heading in ("host µs", "messages", "KB", "loss", "same rolls, loss"):
        table.add_column(heading, justify="right")
    for mode, row in result["rows"].items():
        ratio, exposed = row["ratio"], row["step_delta_us"]
        same = f"{_yes(row['rolls_equal'])}, {_yes(row['loss_equal'])}"
        table.add_row(
            mode,
            f"{row['median_ms']:.2f} ({row['p10_ms']:.2f}-{row['p90_ms']:.2f})",
            f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]",
            f"{exposed['value']:.0f} [{exposed['low']:.0f}, {exposed['high']:.0f}]",
            stall_of(row),
            efficiency_of(mode, row),
            f"{row['tokens_per_s']:,.0f}",
            f"{row['host_us']:.0f}",
            f"{row['messages_per_step']:.0f}",
            f"{row['bytes_per_step'] / 1000:.1f}",
            f"{row['loss']:.5f}",
            {TIMING_ONLY: "timing only", BASELINE: "the reference"}.get(mode, same),
        )
    return table


def stall_of(row: dict[str, Any]) -> str:
    """What CUDA events say that the rolls held up the compute stream, where there are any."""
    one = row["stall_us"]
    return "-" if one is None else f"{one['value']:.0f} [{one['low']:.0f}, {one['high']:.0f}]"


def efficiency_of(mode: str, row: dict[str, Any]) -> str:
    """Overlap efficiency with its interval, where there is one."""
    one = row["efficiency"]
    if one is None or mode in (BASELINE, TIMING_ONLY):
        return "-"
    return f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


if __name__ == "__main__":
    typer.run(main)
