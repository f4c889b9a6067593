"""What share of a step would the exchange take on more ranks than were measured, on a fast link and a slow one?

    python experiments/scaling_model.py --fast experiments/results/2xH200 --slow experiments/results/2xH200-socket

Fits a few costs (of a message, of launching it, of a byte) to some recorded runs, checks them on the others, and
counts with the library's own plans what larger cp groups exchange. `--fast` and `--slow` are folders of records of
`sweep.py` and `roll_latency.py`; each may be given several times, and more ranks than the fewest are held out. The
slow folder is made by the same commands under NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_NET=Socket, and with
transport process_group: symmetric memory knows nothing of these variables. Needs no GPU and no ranks. Writes
`scaling_model.json` and a picture into `--out`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import scaling_report as report
import typer
from cost_model import SCHEDULES, Costs, Load, Measured, count, fit
from rich.console import Console
from step_records import (
    Record,
    documents_of,
    isolated_in,
    load_of,
    measured_in,
    plain_steps,
    read_records,
    step_of,
    transport_in,
)

CP_SIZES = (2, 4, 8, 16, 32, 64, 128)
ASSUMPTIONS = (
    "Every cp_size above the recorded ones is extrapolation.",
    "Tokens a rank stay, so that the sequence grows with cp_size; the step without exchange stays as recorded: "
    "attention over longer documents would make it longer, and the shares smaller.",
    "A message costs the same at any cp_size: congestion and waits for late peers would make the shares larger.",
    "Messages of one exchange to several peers are paid one by one: sent at once they would cost less.",
    "What is hidden costs nothing: no slower compute beside it, no unroll behind it.",
    "A step is as long as its device needs, or its host: what both add is not summed.",
)


def main(
    fast: Annotated[list[Path], typer.Option(help="Folder of records on the fast link.")],
    slow: Annotated[list[Path] | None, typer.Option(help="Folder of records on the slow link.")] = None,
    fit_documents: Annotated[str, typer.Option(help="What is fitted to; the rest is held out.")] = "dense,8",
    transport: Annotated[
        str, typer.Option(help="Of the fast link's records; auto: symmetric where they have it.")
    ] = "auto",
    preset: Annotated[str, typer.Option(help="Whose steps are extrapolated.")] = "h4096",
    out: Annotated[Path, typer.Option(help="Where the record and the picture go.")] = Path("out/scaling"),
) -> None:
    """Fits a cost model of the exchange to records, checks it on others, and extrapolates it."""
    console = Console(width=report.WIDTH)
    try:
        chosen = {1 if one == "dense" else int(one) for one in fit_documents.split(",")}
        links = {"fast": link_of(fast, chosen, transport, preset)}
        if slow:
            links["slow"] = link_of(slow, chosen, "process_group", preset)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    result = {"experiment": "scaling_model", "preset": preset, "assumptions": ASSUMPTIONS, "links": links}
    out.mkdir(parents=True, exist_ok=True)
    (out / "scaling_model.json").write_text(json.dumps(result, indent=1) + "\n")
    picture = report.draw(result, out / "scaling_model.png")
    for name, link in links.items():
        for table in report.tables_of(name, link):
            console.print(table)
    for line in ASSUMPTIONS:
        console.print(f"- {line}")
    console.print(f"wrote {out / 'scaling_model.json'}, {picture}", soft_wrap=True)


def link_of(folders: list[Path], fit_documents: set[int], transport: str, preset: str) -> dict[str, Any]:
    """The costs of one link, how well they do on each run, and the shares that follow."""
    records = read_records(folders)
    transport = transport_in(records, transport)
    measured = measured_in(records, fit_documents, transport)
    isolated = isolated_in(records, transport)
    costs = fit(measured, isolated)
    checks = [check(one, costs) for one in measured]
    steps = plain_steps(records)
    return {
        "records": sorted({name.split("/")[0] for name in records}),
        "where": next(iter(steps.values()))["where"],
        "recorded_cp_sizes": sorted({one["where"]["ranks"] for one in steps.values()}),
        "transport": transport,
        "rows_of_roll_latency": len(isolated),
        "costs": asdict(costs),
        "checks": checks,
        "errors": {kind: errors_of([c for c in checks if c["set"] == kind]) for kind in ("fit", "held out")},
        "shares": shares_of(costs, steps, preset),
    }


def check(one: Measured, costs: Costs) -> dict[str, Any]:
    """What the model says of a measured step, beside what was measured."""
    predicted = costs.step_delta_us(one.load, one.step)
    error = predicted - one.step_delta_us
    certain = one.low_us > 0  # where nothing was found to be exposed, there is nothing to be relative to
    return {
        "run": one.run,
        "schedule": one.load.schedule,
        "set": "held out" if one.held_out else "fit",
        "step_delta_us": one.step_delta_us,
        "low_us": one.low_us,
        "high_us": one.high_us,
        "predicted_us": predicted,
        "relative_error": error / one.step_delta_us if certain else None,
        "error_of_step": error / (one.step.floor_us + one.step_delta_us),
        "within_interval": one.low_us <= predicted <= one.high_us,
        "host_us": one.host_us,
        "predicted_host_us": costs.host_us(one.load),
    }


def errors_of(checks: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and largest error: of the step, and of what was exposed where something was."""
    relative = [abs(one["relative_error"]) for one in checks if one["relative_error"] is not None]
    of_step = [abs(one["error_of_step"]) for one in checks]
    return {
        "steps": len(checks),
        "within_interval": sum(one["within_interval"] for one in checks),
        "of_step": {"median": float(np.median(of_step)), "largest": max(of_step)} if of_step else None,
        "exposing": len(relative),
        "of_exposed": {"median": float(np.median(relative)), "largest": max(relative)} if relative else None,
    }


def shares_of(costs: Costs, steps: dict[str, Record], preset: str) -> list[dict[str, Any]]:
    """Shares of a training step by schedule and cp_size, from the steps of `preset` on the fewest ranks.

    Documents either stay as many as they are, and grow longer, or keep their length, and grow in number. Of several
    launches with as many documents the first counts.
    """
    chosen = [
        record
        for name, record in steps.items()
        if name.split("/")[1].startswith(f"{preset}-") and not record["settings"]["forward_only"]
    ]
    if not chosen:
        raise ValueError(f"there is no record of a training step of preset {preset!r}")
    fewest = min(record["where"]["ranks"] for record in chosen)
    by_documents = {documents_of(one): one for one in reversed(chosen) if one["where"]["ranks"] == fewest}
    lines = []
    for _, record in sorted(by_documents.items()):
        step, documents = step_of(record, list(steps.values())), documents_of(record)
        for grows in (False, True) if documents > 1 else (False,):
            for schedule in SCHEDULES:
                base = load_of(record, schedule)
                loads = [
                    _scaled(base, size, fewest if grows else size) for size in CP_SIZES if size >= fewest
                ]
                lines.append(
                    {
                        "documents": documents,
                        "documents_grow": grows,
                        "schedule": schedule,
                        "cp_sizes": [load.cp_size for load in loads],
                        "num_documents": [load.documents for load in loads],
                        "messages": [count(load).messages for load in loads],
                        "shares": [costs.share(load, step) for load in loads],
                    }
                )
    return lines


def _scaled(load: Load, cp_size: int, recorded_at: int) -> Load:
    """The load on `cp_size` ranks, with documents for each rank as there are on `recorded_at` ranks."""
    documents = load.documents * cp_size // recorded_at
    return Load(load.schedule, cp_size, load.depths, documents, max(load.max_documents, documents))


if __name__ == "__main__":
    typer.run(main)
