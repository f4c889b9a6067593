"""Which targets do the records meet? One table, a line a figure, each with the command that makes it again.

    python experiments/targets.py experiments/results/2xH200 --out experiments/results/targets.md

Reads, in each folder and where they are there: records of `sweep.py` (and of its runs in the folders
`one-connection`, `graph`, `slow` and `second`), `roll_latency.json`, `soak.json`, and the `--profiles`. A ratio is met
when the whole of its 95 % interval is within the limit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from overlap_mtp.profiling import ProfileError, read_profile, report_on

Record = dict[str, Any]
SWEEP = "python experiments/sweep.py --documents dense,8,32,128"
COMMANDS = {
    "": SWEEP,
    "second": SWEEP,
    "one-connection": f"CUDA_DEVICE_MAX_CONNECTIONS=1 {SWEEP}",
    "graph": f"{SWEEP} --graph".replace("dense,8,32,128", "dense"),
    "slow": f"NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_NET=Socket {SWEEP} --transport process_group",
}
RATIOS = {  # of a step over `prepared`, by schedule, preset and direction
    ("prefetch", "h4096", "train"): 1.004,
    ("prefetch", "h4096", "forward"): 1.006,
    ("prefetch", "h2048", "train"): 1.01,
    ("prefetch", "h2048", "forward"): 1.04,
    ("overlap", "h4096", "train"): 1.008,
}
EXPOSED_US = 100  # of `prefetch`
EFFICIENCY = {"h2048": 0.97, "slow": 0.99}  # overlap efficiency of `prefetch`, at least
HIDDEN = 0.99  # of the exchange of `prefetch`, in a profile


@dataclass(frozen=True)
class Line:
    """One figure against its target."""

    what: str
    limit: str
    measured: str
    met: bool
    command: str


def at_most(what: str, limit: float, one: dict[str, float], command: str, digits: int = 4) -> Line:
    return Line(what, f"<= {limit:g}", _interval(one, digits), one["high"] <= limit, command)


def at_least(what: str, limit: float, one: dict[str, float], command: str, digits: int = 3) -> Line:
    return Line(what, f">= {limit:g}", _interval(one, digits), one["low"] >= limit, command)


def _interval(one: dict[str, float], digits: int) -> str:
    return f"{one['value']:.{digits}f} [{one['low']:.{digits}f}, {one['high']:.{digits}f}]"


def lines_of_steps(name: str, record: Record, kind: str) -> Iterator[Line]:
    """The targets of one comparison. `name`: <preset>-<documents>-<direction>, `kind`: a key of COMMANDS."""
    preset, documents, direction = name.split("-")[:3]
    where = f"{preset}, {documents}, {direction}" + (f", {kind}" if kind else "")
    command = COMMANDS[kind]
    for mode, row in record["rows"].items():
        schedule = mode.partition(":")[0]
        what = f"{schedule} ({record['transport'][mode]})" if record["transport"][mode] else schedule
        if kind == "slow":
            if schedule == "prefetch" and row["efficiency"]:
                yield at_least(
                    f"efficiency of {what}, {where}", EFFICIENCY["slow"], row["efficiency"], command
                )
            continue
        limit = RATIOS.get((schedule, preset, direction))
        if limit is not None:
            yield at_most(f"{what} / prepared, {where}", limit, row["ratio"], command)
        if schedule == "prefetch":
            yield at_most(f"exposed µs of {what}, {where}", EXPOSED_US, row["exposed_us"], command, digits=0)
            if preset == "h2048" and row["efficiency"]:
                yield at_least(
                    f"efficiency of {what}, {where}", EFFICIENCY["h2048"], row["efficiency"], command
                )
        if mode == "none":
            holds = row["ratio"]["low"] <= 1 <= row["ratio"]["high"]
            yield Line(f"none / prepared, {where}", "holds 1", _interval(row["ratio"], 4), holds, command)


def lines_of_latency(record: Record) -> Iterator[Line]:
    command = "python experiments/roll_latency.py"
    for one in record["targets"]:
        make = at_most if one["at_most"] else at_least
        yield make(one["what"], one["limit"], one, command, 2)


def lines_of_soak(record: Record) -> Iterator[Line]:
    for run in record["runs"]:
        what = f"wrong words in {run['exchanges']:,} exchanges ({run['transport']})"
        wrong = run["wrong_words"]
        yield Line(what, "0", str(wrong), wrong == 0, "python experiments/soak.py")


def lines_of_profile(path: Path) -> Iterator[Line]:
    preset, _, kind = path.name.partition(".")[0].partition("-")
    command = f"profiles/capture.sh {path.name} --preset {preset} --documents {kind or 'dense'}"
    for schedule in report_on([read_profile(path)]).schedules:
        hidden = schedule.exchange_worst
        if schedule.name.partition(":")[0] == "prefetch" and hidden is not None:
            yield Line(
                f"hidden fraction of {schedule.name}, worst device, {path.name}",
                f">= {HIDDEN:g}",
                f"{hidden:.3f}",
                hidden >= HIDDEN,
                command,
            )


def lines_of_folder(folder: Path) -> Iterator[Line]:
    """All targets that the records of a folder can decide."""
    for kind in COMMANDS:
        for path in sorted((folder / kind).glob("h*-*.json")):
            yield from lines_of_steps(path.stem, json.loads(path.read_text()), kind)
    for name, reader in (("roll_latency", lines_of_latency), ("soak", lines_of_soak)):
        path = folder / f"{name}.json"
        if path.exists():
            yield from reader(json.loads(path.read_text()))


def markdown_of(title: str, lines: list[Line]) -> str:
    met = sum(line.met for line in lines)
    text = [f"## {title}: {met} of {len(lines)} met", ""]
    text += ["| target | limit | measured | met | made by |", "|---|---|---|---|---|"]
    text += [
        f"| {line.what} | {line.limit} | {line.measured} | {'yes' if line.met else '**no**'} | `{line.command}` |"
        for line in lines
    ]
    return "\n".join(text) + "\n"


def main(
    folders: Annotated[list[Path], typer.Argument(help="Records, a folder for each kind of machine.")],
    profiles: Annotated[str, typer.Option(help="Recorded profiles, a glob.")] = "profiles/*.sqlite.gz",
    out: Annotated[Path | None, typer.Option(help="A Markdown file.")] = None,
) -> None:
    """States for each target whether it is met."""
    parts = []
    for folder in folders:
        lines = list(lines_of_folder(folder))
        if not lines:
            raise typer.BadParameter(f"{folder} holds no record that a target is about")
        parts.append(markdown_of(folder.name, lines))
    try:
        found = [line for path in sorted(Path().glob(profiles)) for line in lines_of_profile(path)]
    except ProfileError as error:
        raise typer.BadParameter(str(error)) from None
    if found:
        parts.append(markdown_of("profiles", found))
    text = "# Targets\n\n" + "\n".join(parts)
    if out is not None:
        out.write_text(text)
    Console(width=200).print(text, markup=False)


if __name__ == "__main__":
    typer.run(main)
