"""Do the three instruments read the same exposed time of an exchange? One run, seen by all of them; a line a mode.

    profiles/capture.sh out/h4096/profile.sqlite.gz --preset h4096 --documents packed --rounds 20 --out out/h4096
    python experiments/instruments.py out/h4096 --out experiments/results/instruments.md

Reads `results.json` (of compare_modes) and `profile.sqlite.gz` (of the same run) in each folder. `prepared`, which the
step difference is taken from, and `none` exchange nothing and are left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from compare.comparison import BASELINE, TIMING_ONLY, metered, schedule_of
from rich.console import Console
from rich.table import Table

from overlap_mtp.model.config import PRESETS
from overlap_mtp.profiling import Report, exposed_by_step, read_profile, report_on

Figure = dict[str, float]  # value, low and high, in µs
Record = dict[str, Any]
RESULTS, PROFILE = "results.json", "profile.sqlite.gz"
COLUMNS = ("configuration", "mode", "step difference µs", "CUDA events µs", "Nsight Systems µs", "agree")
WITHIN = 0.05  # of the largest figure, for `sync`
MOST_AROUND_MS = (
    0.2  # that a timed step is longer than its range; 0.03 to 0.2 under torch.profiler on 2 CPU ranks
)
CLOCKS_MS = 0.005  # by which two clocks may differ over a step
SAME_STEPS = 0.75  # of the steps fit, at least; of another run as fast as this one about half would
WIDTH = 190
COUNTS = f"""\
Medians over the steps of one run, on the rank where a step, its calls or its exchange took longest, with 95 %
intervals. The profiler slows the host: compare the figures of a line with one another, not with other records.
The step difference is the whole step less that of `{BASELINE}`: it misses nothing, the host's time among it, and has
the noise of two steps. CUDA events count what the calls of the exchange kept the compute stream from: the unroll,
waits at the join and, where the device is ahead, the host's time in the calls. Nsight Systems counts what was not
under compute on the same device of the kernels and copies of `pack` and `send-recv`: no unroll, no wait at the join,
no gap in which the device waits for the host.

agree: of `sync` the smallest figure is within {100 * WITHIN:g} % of the largest; of the others the intervals overlap,
which is as sharp as the widest of them, else it says by how much they miss one another."""


@dataclass(frozen=True)
class Line:
    """What the instruments read of one mode of one run, in the order of COLUMNS; None where one saw nothing."""

    configuration: str
    mode: str
    figures: tuple[Figure | None, ...]
    agree: str

    def cells(self) -> tuple[str, ...]:
        return self.configuration, self.mode, *map(_interval, self.figures), self.agree


def _interval(one: Figure | None) -> str:
    return "-" if one is None else f"{one['value']:,.1f} [{one['low']:,.1f}, {one['high']:,.1f}]"


def agreement(schedule: str, figures: Sequence[Figure | None]) -> str:
    """Whether the readings (µs) of a schedule agree: "yes" or "no", and by how much where that says something.

    `sync` exposes all that it takes: values within 5 % of the largest agree. What the others expose may be near 0:
    intervals that overlap agree. "-" where a single instrument saw anything.
    """
    read = [one for one in figures if one is not None]
    if len(read) < 2:
        return "-"
    missing = "" if len(read) == len(figures) else f" ({len(read)} instruments)"
    largest, smallest = max(one["value"] for one in read), min(one["value"] for one in read)
    if schedule == "sync" and largest > 0:
        apart = (largest - smallest) / largest
        return f"{'yes' if apart <= WITHIN else 'no'}: {100 * apart:.1f} % apart{missing}"
    gap = max(one["low"] for one in read) - min(one["high"] for one in read)
    return (f"no: by {gap:,.1f} µs" if gap > 0 else "yes") + missing


def configuration_of(record: Record) -> str:
    """Preset (else hidden size), documents, direction, devices and rounds, and what else is not as by default."""
    settings, where = record["settings"], record["where"]
    names = [name for name, preset in PRESETS.items() if asdict(preset.model) == settings["model"]]
    documents = settings["num_documents"]
    parts = [
        names[0] if names else f"hidden {settings['model']['hidden_size']}",
        "dense" if documents is None else f"{documents} documents",
        "forward" if settings["forward_only"] else "train",
        f"{where['ranks']} x {where['device']}",
        f"{settings['rounds']} rounds",
    ]
    parts += [settings["layout"]] if settings["layout"] != "zigzag" else []
    parts += [flag for flag in ("compiled", "captured") if settings[flag]]
    return ", ".join(parts + [f"{name}={value}" for name, value in where.get("environment", {}).items()])


def check_same_run(record: Record, report: Report) -> None:
    """Raises ValueError where a profile is of another run than a record: other ranks, modes, steps or times."""
    if len(report.lanes) != record["where"]["ranks"]:
        raise ValueError(f"{record['where']['ranks']} ranks recorded, {len(report.lanes)} devices profiled")
    recorded = {mode: len(times) for mode, times in record["times_ms"].items()}
    for lane in report.lanes:
        profiled = Counter(step.schedule for step in lane.steps)
        if profiled != recorded:
            raise ValueError(f"steps recorded: {recorded}; profiled on {lane.label}: {dict(profiled)}")
    fits: list[bool] = []
    for mode, times in record["times_ms"].items():
        ranges = [[s.end - s.start for s in lane.steps if s.schedule == mode] for lane in report.lanes]
        around = np.array(times) - np.max(ranges, axis=0) / 1e6  # a step's range lies in what is timed
        fits += ((around >= -CLOCKS_MS) & (around <= MOST_AROUND_MS)).tolist()
    if sum(fits) < SAME_STEPS * len(fits):
        raise ValueError(
            f"only {sum(fits)} of {len(fits)} steps take as long in the profile as in the record"
        )


def lines_of(record: Record, report: Report) -> Iterator[Line]:
    """A line for each mode that exchanges. Raises ValueError where record and profile are of different runs."""
    check_same_run(record, report)
    exposed = [exposed_by_step(lane) for lane in report.lanes]
    for mode, row in record["rows"].items():
        schedule, transport = schedule_of(mode), record["transport"][mode]
        if schedule in (BASELINE, TIMING_ONLY):
            continue
        steps = [[step.schedule == mode for step in lane.steps] for lane in report.lanes]
        by_lane = [one[mine] for one, mine in zip(exposed, steps, strict=True)]
        nsight = metered(np.fmax.reduce(by_lane), record["settings"]["seed"])  # NaN: no lane saw an exchange
        figures = (row["exposed_us"], row["metered_us"], nsight)
        name = f"{schedule} ({transport})" if transport else schedule
        yield Line(configuration_of(record), name, figures, agreement(schedule, figures))


def read_run(folder: Path) -> tuple[list[Line], tuple[str, ...]]:
    """The lines of a run, and the notes on its profile. Raises ValueError, with the folder and the reason."""
    for name in (RESULTS, PROFILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} must hold {RESULTS} and {PROFILE}: there is no {name}")
    try:
        record = json.loads((folder / RESULTS).read_text())
        report = report_on([read_profile(folder / PROFILE)])
        return list(lines_of(record, report)), report.notes
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: {RESULTS} is not a record of compare_modes ({error!r})") from error
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def main(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help=f"With {RESULTS} and {PROFILE}.")],
    out: Annotated[Path | None, typer.Option(help="A Markdown file.")] = None,
) -> None:
    """Puts step differences, CUDA events and Nsight Systems side by side."""
    try:
        runs = [read_run(folder) for folder in folders]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    table = Table(*COLUMNS)
    text = ["# Instruments", "", f"| {' | '.join(COLUMNS)} |", "|" + len(COLUMNS) * "---|"]
    below = [COUNTS]
    for folder, (lines, notes) in zip(folders, runs, strict=True):
        for line in lines:
            table.add_row(*line.cells())
            text.append(f"| {' | '.join(line.cells())} |".replace("| no:", "| **no**:"))
        below += [f"{folder.name}: {note}" for note in notes]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join([*text, "", "\n\n".join(below)]) + "\n")
    console = Console(width=WIDTH, markup=False, highlight=False)
    console.print(table, "\n\n".join(below), sep="\n")


if __name__ == "__main__":
    typer.run(main)
