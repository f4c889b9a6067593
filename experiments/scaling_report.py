"""The tables and the picture of `scaling_model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from rich.table import Table

from harness import plots

WIDTH = 150
LEAST_SHARE = 1e-5  # below it, a share is drawn at the bottom, and said to be


def tables_of(name: str, link: dict[str, Any]) -> list[Table]:
    """Costs, predicted against measured, and the extrapolated shares of one link."""
    return [_costs_table(name, link), _checks_table(name, link), _shares_table(name, link)]


def _costs_table(name: str, link: dict[str, Any]) -> Table:
    table = Table(title=f"{name} link: fitted costs", caption=_caption(link))
    table.add_column("cost")
    table.add_column("value", justify="right")
    for cost, value in link["costs"].items():
        table.add_row(cost, f"{value:.3f}" if value else "0 (or not seen in these records)")
    return table


def _caption(link: dict[str, Any]) -> str:
    parts = [f"transport {link['transport']}", f"{link['rows_of_roll_latency']} rows of roll_latency"]
    for kind, errors in link["errors"].items():
        if errors["of_step"] is None:
            parts.append(f"{kind}: none")
            continue
        said = f"{kind}: off by {errors['of_step']['median']:.2%} of the step in the median, "
        said += f"{errors['of_step']['largest']:.2%} at most"
        if errors["of_exposed"]:
            said += f"; by {errors['of_exposed']['median']:.0%} of what is exposed, "
            said += f"{errors['of_exposed']['largest']:.0%} at most, where something is"
        parts.append(said)
    return ". ".join(parts)


def _checks_table(name: str, link: dict[str, Any]) -> Table:
    table = Table(title=f"{name} link: exposed µs, predicted and measured")
    for column in ("run", "schedule", "set", "measured [95 %]", "predicted", "error", "of the step"):
        table.add_column(column, justify="left" if column in ("run", "schedule", "set") else "right")
    for one in sorted(link["checks"], key=lambda one: one["set"]):
        relative = one["relative_error"]
        table.add_row(
            one["run"],
            one["schedule"],
            one["set"],
            f"{one['step_delta_us']:,.0f} [{one['low_us']:,.0f}, {one['high_us']:,.0f}]",
            f"{one['predicted_us']:,.0f}",
            "-" if relative is None else f"{relative:+.0%}",
            f"{one['error_of_step']:+.2%}",
        )
    return table


def _shares_table(name: str, link: dict[str, Any]) -> Table:
    sizes = link["shares"][0]["cp_sizes"]
    table = Table(title=f"{name} link: share of a training step; extrapolated but for {_recorded(link)}")
    for column in ("documents", "schedule", *(f"cp {size}" for size in sizes)):
        table.add_column(column, justify="right" if column.startswith("cp") else "left")
    for line in link["shares"]:
        shares = (f"{share:.2%}" for share in line["shares"])
        table.add_row(_documents(line), line["schedule"], *shares)
    return table


def _recorded(link: dict[str, Any]) -> str:
    return "cp_size " + ", ".join(str(size) for size in link["recorded_cp_sizes"])


def _documents(line: dict[str, Any]) -> str:
    if line["documents"] == 1:
        return "dense"
    if line["documents_grow"]:
        return f"{line['num_documents'][0]} to {line['num_documents'][-1]}, of one length"
    return str(line["documents"])


def draw(result: dict[str, Any], path: Path) -> Path:
    """Shares by cp_size: a row for each kind of documents, a column for each link."""
    links = result["links"]
    kinds = [(line["documents"], line["documents_grow"]) for line in next(iter(links.values()))["shares"]]
    kinds = list(dict.fromkeys(kinds))
    size = (1.5 + 4.5 * len(links), 1 + 2.4 * len(kinds))
    figure, grid = plt.subplots(
        len(kinds), len(links), figsize=size, sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for row, kind in zip(grid, kinds, strict=True):
        for axes, (name, link) in zip(row, links.items(), strict=True):
            lines = [one for one in link["shares"] if (one["documents"], one["documents_grow"]) == kind]
            _panel(axes, lines, max(link["recorded_cp_sizes"]))
            if lines:
                axes.set_title(f"{name} link, documents: {_documents(lines[0])}", fontsize=9)
        row[0].set_ylabel(f"share of the step\n(bottom: < {LEAST_SHARE:.0e})")
    for axes in grid[-1]:
        axes.set_xlabel("cp_size; shaded: extrapolated")
    grid[0][0].legend(fontsize=7)
    device = next(iter(links.values()))["where"]["device"]
    figure.suptitle(f"Exchange in a training step, {result['preset']} on {device}, modelled", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _panel(axes: Any, lines: list[dict[str, Any]], recorded: int) -> None:
    for line in lines:
        axes.plot(
            line["cp_sizes"],
            [max(share, LEAST_SHARE) for share in line["shares"]],
            color=plots.COLOURS[line["schedule"]],
            linestyle="--" if line["schedule"] == "overlap" else "-",  # often on another's line
            marker="o",
            markersize=6 if line["schedule"] == "overlap" else 3,
            label=line["schedule"],
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(LEAST_SHARE / 2, 1)
    sizes = lines[0]["cp_sizes"] if lines else []
    axes.set_xticks(sizes, [str(size) for size in sizes])
    if sizes and sizes[-1] > recorded:
        axes.axvspan(recorded * 2**0.5, sizes[-1], color="black", alpha=0.05)
    axes.grid(alpha=0.3)
