"""Which targets do the records meet? A table a target, a line a case, each with the command that makes it again.

    python experiments/targets.py experiments/results/2xH200 --out experiments/results/targets.md

Reads, at any depth below each folder: records of `sweep.py`, `roll_latency.json`, `soak.json`; and the `--profiles`.
Records of one case in several folders are launches of the same; what makes a case (link, queues, graphs) is read from
the record. A figure is within its limit when the whole of its 95 % interval is, a case when all launches are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from overlap_mtp.profiling import ProfileError, read_profile, report_on

Record = dict[str, Any]
STEPS = re.compile(r"h\d+-(dense|\d+)-(train|forward)")  # names of sweep.py's records
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


RULE = """A figure with an interval is met when the whole of its 95 % interval is within the limit, so that noise counts
as a miss; a case is met when all of its launches are. Limits are the project's own. Launches are named by the folder
of their record. In brackets: what an exchange went over, symmetric memory or NCCL (process_group). Why what is not met
is not: [README.md](README.md).
"""


@dataclass(frozen=True)
class Line:
    """One figure against its target."""

    target: str
    case: str
    limit: str
    measured: str
    met: bool
    command: str
    launch: str = "."  # the folder of the record, below that of the machine


def at_most(
    target: str, case: str, limit: float, one: dict[str, float], command: str, digits: int = 4
) -> Line:
    return Line(target, case, f"<= {limit:g}", _interval(one, digits), one["high"] <= limit, command)


def at_least(
    target: str, case: str, limit: float, one: dict[str, float], command: str, digits: int = 3
) -> Line:
    return Line(target, case, f">= {limit:g}", _interval(one, digits), one["low"] >= limit, command)


def _interval(one: dict[str, float], digits: int) -> str:
    return f"{one['value']:.{digits}f} [{one['low']:.{digits}f}, {one['high']:.{digits}f}]"


def conditions_of(record: Record) -> list[str]:
    """What sets a comparison apart from the usual: queues, link, graphs, compiled layers."""
    environment, settings = record["where"].get("environment", {}), record["settings"]
    found = []
    if environment.get("NCCL_P2P_DISABLE") == "1":
        found.append("slow link")
    if environment.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        found.append("one connection")
    found += [
        word for key, word in (("captured", "CUDA graph"), ("compiled", "compiled")) if settings.get(key)
    ]
    return found


def command_of(name: str, record: Record) -> str:
    """What runs a comparison again."""
    preset, documents, direction = name.split("-")[:3]
    settings = record["settings"]
    words = [f"{key}={value}" for key, value in record["where"].get("environment", {}).items()]
    words += ["python experiments/sweep.py", f"--presets {preset} --documents {documents}"]
    words += [f"--directions {direction} --rounds {settings['rounds']} --modes {','.join(settings['modes'])}"]
    words += [flag for key, flag in (("captured", "--graph"), ("compiled", "--compile")) if settings.get(key)]
    return " ".join(words)


def lines_of_steps(name: str, record: Record) -> Iterator[Line]:
    """The targets of one comparison. `name`: <preset>-<documents>-<direction>..."""
    preset, documents, direction = name.split("-")[:3]
    conditions, command = conditions_of(record), command_of(name, record)
    where = ", ".join([documents if documents == "dense" else f"{documents} documents", *conditions])
    slow = "slow link" in conditions
    for mode, row in record["rows"].items():
        schedule, transport = mode.partition(":")[0], record["transport"][mode]
        case = f"{where} ({transport})" if transport else where
        least = EFFICIENCY.get("slow" if slow else preset)
        if schedule == "prefetch" and row["efficiency"] and least is not None:
            link = "on a slow link" if slow else f"at {preset}"
            yield at_least(
                f"overlap efficiency of prefetch {link}",
                f"{preset}, {direction}, {case}",
                least,
                row["efficiency"],
                command,
            )
        if slow:
            continue
        limit = RATIOS.get((schedule, preset, direction))
        if limit is not None:
            yield at_most(f"{schedule} / prepared, {preset} {direction}", case, limit, row["ratio"], command)
        if schedule == "prefetch":
            target = f"exposed µs of prefetch, {preset}"
            yield at_most(target, f"{direction}, {case}", EXPOSED_US, row["exposed_us"], command, digits=0)
            if row.get("metered_us"):
                target = f"µs for which prefetch holds up the compute stream (meter), {preset}"
                yield at_most(
                    target, f"{direction}, {case}", EXPOSED_US, row["metered_us"], command, digits=0
                )
        if mode == "none":
            holds = row["ratio"]["low"] <= 1 <= row["ratio"]["high"]
            case = f"{preset}, {direction}, {where}"
            yield Line("none / prepared", case, "holds 1", _interval(row["ratio"], 4), holds, command)


def lines_of_latency(record: Record) -> Iterator[Line]:
    command = "python experiments/roll_latency.py"
    for one in record["targets"]:
        make = at_most if one["at_most"] else at_least
        yield make("rolls alone (roll_latency)", one["what"], one["limit"], one, command, 2)


def lines_of_soak(record: Record) -> Iterator[Line]:
    for run in record["runs"]:
        case, wrong = f"{run['exchanges']:,} exchanges ({run['transport']})", run["wrong_words"]
        yield Line("soak: wrong words", case, "0", str(wrong), wrong == 0, "python experiments/soak.py")


def lines_of_profile(path: Path) -> Iterator[Line]:
    preset, _, kind = path.name.partition(".")[0].partition("-")
    options = "--compile --documents packed" if kind == "compile" else f"--documents {kind or 'dense'}"
    command = f"profiles/capture.sh {path.name} --preset {preset} {options}"
    for schedule in report_on([read_profile(path)]).schedules:
        hidden = schedule.exchange_worst
        if schedule.name.partition(":")[0] == "prefetch" and hidden is not None:
            case = f"{schedule.name}, worst device, {path.name}"
            met = hidden >= HIDDEN
            yield Line(
                "hidden fraction of prefetch, Nsight", case, f">= {HIDDEN:g}", f"{hidden:.3f}", met, command
            )


def lines_of_folder(folder: Path) -> Iterator[Line]:
    """All targets that the records of a folder, and of those in it, can decide."""
    readers = {"roll_latency": lines_of_latency, "soak": lines_of_soak}
    for path in sorted(folder.rglob("*.json"), key=lambda path: (len(path.parts), path)):
        record = json.loads(path.read_text())
        lines: Iterator[Line] = iter(())
        if path.stem in readers:
            lines = readers[path.stem](record)
        elif STEPS.match(path.stem):
            lines = lines_of_steps(path.stem, record)
        for line in lines:
            yield replace(line, launch=str(path.parent.relative_to(folder)))


def markdown_of(title: str, lines: list[Line]) -> str:
    """A summary, and a table for each target; launches of a case side by side."""
    cases: dict[str, dict[tuple[str, str], list[Line]]] = {}
    for line in sorted(lines, key=lambda line: (line.target, line.case)):
        cases.setdefault(line.target, {}).setdefault((line.case, line.limit), []).append(line)
    met = {
        target: sum(all(line.met for line in launches) for launches in mine.values())
        for target, mine in cases.items()
    }
    text = [f"## {title}: {sum(met.values())} of {sum(map(len, cases.values()))} cases met", ""]
    text += ["| target | limit | cases met |", "|---|---|---|"]
    for target, mine in cases.items():
        limits = {limit for _, limit in mine}
        text.append(
            f"| {target} | {limits.pop() if len(limits) == 1 else 'see below'} | {met[target]} of {len(mine)} |"
        )
    for target, mine in cases.items():
        text += [
            "",
            f"### {target}",
            "",
            "| case | limit | measured | met | made by |",
            "|---|---|---|---|---|",
        ]
        for (case, limit), launches in mine.items():
            many = len(launches) > 1
            figures = "<br>".join(one.measured + (f" ({one.launch})" if many else "") for one in launches)
            good = sum(one.met for one in launches)
            verdict = "yes" if good == len(launches) else f"{good} of {len(launches)}" if good else "**no**"
            text.append(f"| {case} | {limit} | {figures} | {verdict} | `{launches[-1].command}` |")
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
    text = f"# Targets\n\n{RULE}\n" + "\n".join(parts)
    if out is not None:
        out.write_text(text)
    Console(width=200).print(text, markup=False)


if __name__ == "__main__":
    typer.run(main)
