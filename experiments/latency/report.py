"""What `roll_latency` found: a row for each configuration, tables, and a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from matplotlib import pyplot as plt
from rich.table import Table

from harness import plots, statistics
from latency.cases import Candidate, Workload

WIDTH = 150
Row = dict[str, Any]
CAPTION = (
    "median host µs (on cold caches) | wall µs | GPU µs of a graph replay, each of all tensors and depths of a "
    "microbatch, on the slowest rank"
)


def rows_of(candidates: list[Candidate]) -> list[Row] | None:
    """A row for each configuration, on rank 0. Collective: a roll takes as long as on its slowest rank."""
    mine = [(s.host_us, s.wall_us, s.gpu_us, s.sent or (0, 0), s.differs, s.cold_us) for s in candidates]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank():
        return None
    return [_row(candidate, [ranks[at] for ranks in everyone]) for at, candidate in enumerate(candidates)]


def _row(candidate: Candidate, by_rank: list[Any]) -> Row:
    workload, method = candidate.configuration.workload, candidate.configuration.method
    host, wall, gpu, sent, differs, cold = zip(*by_rank, strict=True)
    row: Row = {
        "schedule": method.schedule,
        "transport": method.transport,
        **asdict(workload),
        "failed": candidate.failed,
    }
    if candidate.failed is None:
        row |= {
            "rounds": len(host[0]),
            "host_us": _summary(host),
            "cold_us": _summary(cold),
            "wall_us": _summary(wall),
            "gpu_us": _summary(gpu) if gpu[0] and candidate.graph_failed is None else None,
            "graph_failed": candidate.graph_failed,
            "exchanges": 1 if method.schedule == "prefetch" else workload.depths,
            "messages": None if candidate.sent is None else max(one[0] for one in sent),
            "bytes": None if candidate.sent is None else max(one[1] for one in sent),
            "differing_slots": sum(one[0] for one in differs),
            "differing_valid_slots": sum(one[1] for one in differs),
        }
    return row


def _summary(by_rank: tuple[list[float], ...]) -> dict[str, float]:
    samples = np.array(by_rank, np.float64).max(0)
    estimate = statistics.median(samples)
    p10, p90 = np.percentile(samples, [10, 90])
    named = {"median": estimate.value, "low": estimate.low, "high": estimate.high, "p10": p10, "p90": p90}
    return {name: round(float(value), 2) for name, value in named.items()}


def find(rows: list[Row], workload: Workload, schedule: str, transport: str) -> Row | None:
    """The row of a configuration that ran."""
    wanted = {**asdict(workload), "schedule": schedule, "transport": transport, "failed": None}
    return next((row for row in rows if wanted.items() <= row.items()), None)


def methods_in(rows: list[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["schedule"], row["transport"]) for row in rows))


def tables_of(result: Row, lines: dict[str, list[Workload]]) -> list[Table]:
    """A table for each line of workloads, one of what failed."""
    rows, where = result["rows"], result["where"]
    tables = []
    for name, line in lines.items():
        table = Table(title=f"{where['ranks']} x {where['device']}: {name}", caption=CAPTION)
        table.add_column("schedule")
        for workload in line:
            table.add_column(heading(workload), justify="right", no_wrap=True)
        for method in methods_in(rows):
            cells = [_cell(find(rows, workload, *method)) for workload in line]
            if any(cell != "-" for cell in cells):
                table.add_row(" ".join(method).rstrip(), *cells)
        tables.append(table)
    wrong = [row for row in rows if row["failed"] or row["graph_failed"] or row["differing_slots"]]
    if wrong:
        tables.append(_notes_table(wrong))
    return tables


def heading(workload: Workload) -> str:
    documents = "dense" if workload.documents == 1 else f"{workload.documents} docs"
    return f"D={workload.depths}, {documents}, {workload.tokens}"


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    gpu = f" | {row['gpu_us']['median']:.1f}" if row["gpu_us"] else ""
    host = f"{row['host_us']['median']:,.0f} ({row['cold_us']['median']:,.0f})"
    return f"{host} | {row['wall_us']['median']:,.0f}{gpu}"


def _notes_table(rows: list[Row]) -> Table:
    table = Table(title="failed, or other bits than the oracle's")
    for column in ("schedule", "workload", "what"):
        table.add_column(column)
    for row in rows:
        workload = Workload(row["cp_size"], row["depths"], row["documents"], row["tokens"])
        if row["failed"]:
            what = row["failed"]
        elif row["graph_failed"]:
            what = f"no graph: {row['graph_failed']}"
        else:
            valid = row["differing_valid_slots"]
            what = f"{row['differing_slots']} slots differ, {valid} of them where the token ahead is valid"
        table.add_row(
            f"{row['schedule']} {row['transport']}", f"cp {workload.cp_size}, {heading(workload)}", what
        )
    return table


def draw(result: Row, lines: dict[str, list[Workload]], path: Path) -> Path:
    """Host time against documents and against depths, and GPU time against depths where graphs ran."""
    rows, where = result["rows"], result["where"]
    by_depth = [name for name in lines if name.startswith("depths")]
    panels: list[tuple[str, str, Callable[[Workload], int]]] = [
        (next(iter(lines)), "host_us", lambda workload: workload.documents)
    ]
    panels += [(name, "host_us", lambda workload: workload.depths) for name in by_depth[-1:]]
    if any(row.get("gpu_us") for row in rows):
        panels += [(name, "gpu_us", lambda workload: workload.depths) for name in by_depth[-1:]]
    size = (5 * len(panels), 4.2)
    figure, all_axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axes, (name, quantity, of) in zip(all_axes[0], panels, strict=True):
        for method in methods_in(rows):
            found = [(of(workload), find(rows, workload, *method)) for workload in lines[name]]
            shown = [(x, row[quantity]) for x, row in found if row is not None and row[quantity]]
            if shown:
                _plot(axes, method, shown)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(
            [of(workload) for workload in lines[name]], [str(of(workload)) for workload in lines[name]]
        )
        axes.set_xlabel("documents (1: dense)" if of(Workload(0, 1, 2, 0)) == 2 else "depths D")
        axes.set_ylabel(f"{'host' if quantity == 'host_us' else 'GPU'} µs of a microbatch's rolls")
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3, which="both")
    all_axes[0][0].legend(handlelength=4, fontsize=7)
    figure.suptitle(
        f"{where['ranks']} x {where['device']}, {lines[next(iter(lines))][0].tokens} tokens a rank, "
        f"median and 95 % interval, {where['date']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _plot(axes: Any, method: tuple[str, str], shown: list[tuple[int, dict[str, float]]]) -> None:
    schedule, transport = method
    medians = [one["median"] for _, one in shown]
    errors = [
        [one["median"] - one["low"] for _, one in shown],
        [one["high"] - one["median"] for _, one in shown],
    ]
    axes.errorbar(
        [x for x, _ in shown],
        medians,
        errors,
        color=plots.COLOURS.get(schedule, "#222222"),
        linestyle="--" if transport in ("symmetric", "device") else "-",
        marker="o",
        markersize=3,
        capsize=2,
        label=f"{schedule} {transport}".rstrip(),
    )
