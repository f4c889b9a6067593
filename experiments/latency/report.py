"""What `roll_latency` found: a row for each configuration, tables, and a picture."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from matplotlib import pyplot as plt
from rich.table import Table

from harness import plots, statistics
from latency.cases import Candidate, Method, Workload

WIDTH = 150
Row = dict[str, Any]
CAPTION = (
    "median host µs (on cold caches) | wall µs | GPU µs of a graph replay, each of all tensors and depths of a "
    "microbatch, on the slowest rank"
)


def rows_of(candidates: list[Candidate]) -> list[Row] | None:
    """Gather what all ranks measured. Collective.

    Args:
        candidates: of this rank, in the same order on all ranks.

    Returns:
        A row for each configuration on rank 0, else None. A roll takes as long as on its slowest rank.
    """
    mine = [(s.host_us, s.wall_us, s.gpu_us, s.sent or (0, 0), s.differs, s.cold_us) for s in candidates]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank():
        return None
    return [_row(candidate, [ranks[at] for ranks in everyone]) for at, candidate in enumerate(candidates)]


def _row(candidate: Candidate, by_rank: list[Any]) -> Row:
    workload, method = candidate.configuration.workload, candidate.configuration.method
    host, wall, gpu, sent, differs, cold = zip(*by_rank, strict=True)
    row: Row = {**asdict(method), **asdict(workload), "failed": candidate.failed}
    if candidate.failed is None:
        row |= {
            "rounds": len(host[0]),
            "host_us": _summary(host),
            "cold_us": _summary(cold),
            "wall_us": _summary(wall),
            "gpu_us": _summary(gpu) if gpu[0] and candidate.graph_failed is None else None,
            "graph_failed": candidate.graph_failed,
            "exchanges": method.exchanges(workload.depths),
            "messages": None if candidate.sent is None else max(one[0] for one in sent),
            "bytes": None if candidate.sent is None else max(one[1] for one in sent),
            "differing_tokens": sum(one[0] for one in differs),
            "differing_valid_tokens": sum(one[1] for one in differs),
        }
    return row


def _summary(by_rank: tuple[list[float], ...]) -> dict[str, float]:
    samples = np.array(by_rank, np.float64).max(0)
    estimate = statistics.median(samples)
    p10, p90 = np.percentile(samples, [10, 90])
    named = {"median": estimate.value, "low": estimate.low, "high": estimate.high, "p10": p10, "p90": p90}
    return {name: round(float(value), 2) for name, value in named.items()}


def _find(rows: list[Row], workload: Workload, method: Method) -> Row | None:
    """Return the row of a configuration that ran."""
    wanted = {**asdict(workload), **asdict(method), "failed": None}
    return next((row for row in rows if wanted.items() <= row.items()), None)


def _methods_in(rows: list[Row]) -> list[Method]:
    return list(dict.fromkeys(Method(row["schedule"], row["transport"]) for row in rows))


def tables_of(result: Row, lines: dict[str, list[Workload]]) -> list[Table]:
    """Return a table for each line of workloads, and one of what failed or differed.

    Args:
        result: the record.
        lines: workloads by the line's name.
    """
    rows, where = result["rows"], result["where"]
    tables = []
    for name, line in lines.items():
        table = Table(title=f"{where['ranks']} x {where['device']}: {name}", caption=CAPTION)
        table.add_column("schedule")
        for workload in line:
            table.add_column(str(workload), justify="right", no_wrap=True)
        for method in _methods_in(rows):
            cells = [_cell(_find(rows, workload, method)) for workload in line]
            if any(cell != "-" for cell in cells):
                table.add_row(str(method), *cells)
        tables.append(table)
    wrong = Table("schedule", "workload", "what", title="failed, or differs from the oracle")
    for row in rows:
        what = row["failed"]
        if what is None and row["graph_failed"]:
            what = f"no graph: {row['graph_failed']}"
        elif what is None and row["differing_tokens"]:
            what = (
                f"{row['differing_tokens']} tokens differ, {row['differing_valid_tokens']} of them valid ones"
            )
        if what is not None:
            workload = Workload(row["cp_size"], row["depths"], row["documents"], row["tokens"])
            method = Method(row["schedule"], row["transport"])
            wrong.add_row(str(method), f"cp {workload.cp_size}, {workload}", what)
    return [*tables, wrong] if wrong.row_count else tables


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    gpu = f" | {row['gpu_us']['median']:.1f}" if row["gpu_us"] else ""
    host = f"{row['host_us']['median']:,.0f} ({row['cold_us']['median']:,.0f})"
    return f"{host} | {row['wall_us']['median']:,.0f}{gpu}"


def draw(result: Row, lines: dict[str, list[Workload]], path: Path) -> None:
    """Draw host time against documents and against depths, and GPU time against depths if graphs ran.

    Args:
        result: the record.
        lines: workloads by the line's name; the first one is over documents.
        path: of the picture.
    """
    rows, where = result["rows"], result["where"]
    first = next(iter(lines))
    by_depth = [name for name in lines if name.startswith("depths")][-1:]
    panels = [(first, "host_us", "documents")] + [(name, "host_us", "depths") for name in by_depth]
    if any(row.get("gpu_us") for row in rows):
        panels += [(name, "gpu_us", "depths") for name in by_depth]
    size = (5 * len(panels), 4.2)
    figure, all_axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axes, (name, quantity, varied) in zip(all_axes[0], panels, strict=True):
        sizes = [getattr(workload, varied) for workload in lines[name]]
        for method in _methods_in(rows):
            found = [(x, _find(rows, one, method)) for x, one in zip(sizes, lines[name], strict=True)]
            shown = [(x, row[quantity]) for x, row in found if row is not None and row[quantity]]
            if shown:
                _plot(axes, method, shown)
        axes.set(xscale="log", yscale="log", title=name)
        axes.set_xticks(sizes, [str(one) for one in sizes])
        axes.set_xlabel("documents (1: dense)" if varied == "documents" else "depths D")
        axes.set_ylabel(f"{'host' if quantity == 'host_us' else 'GPU'} µs of a microbatch's rolls")
        axes.grid(alpha=0.3, which="both")
    all_axes[0][0].legend(handlelength=4, fontsize=7)
    what = f"{where['ranks']} x {where['device']}, {lines[first][0].tokens} tokens a rank"
    figure.suptitle(f"{what}, median and 95 % interval, {where['date']}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot(axes: Any, method: Method, shown: list[tuple[int, dict[str, float]]]) -> None:
    medians = [one["median"] for _, one in shown]
    errors = [
        [one["median"] - one["low"] for _, one in shown],
        [one["high"] - one["median"] for _, one in shown],
    ]
    axes.errorbar(
        [x for x, _ in shown],
        medians,
        errors,
        color=plots.COLOURS.get(method.schedule, "#222222"),
        linestyle="--" if method.transport in ("symmetric", "device") else "-",
        marker="o",
        markersize=3,
        capsize=2,
        label=str(method),
    )
