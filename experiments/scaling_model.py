"""What would the exchange add to a step on more ranks than were measured, on a fast link and a slow one?

    S=experiments/results/step_time/2xH200
    python experiments/scaling_model.py --fast $S/default $S/without-sync --slow $S/nvlink-off

Reads records of `sweep.py`. A step gets longer by what the host spends beyond its slack, or by what the device does in
the open, whichever is more. The host pays for each roll and message of `sync`, and for each microbatch and exchange of
the other schedules; the device for each message of `sync`, each blocking exchange and each unroll. These costs are
fitted to some records (non-negative least squares) and checked on the others. The slack of a step is the most host
time that was seen to cost nothing. Needs no GPU. Writes `scaling_model.json` and a picture into `--out`.

What the model cannot say:
- Everything above the recorded cp sizes is extrapolation: no second host, no congestion, no late peer is in it.
- The step without exchange stays as recorded. Attention over longer documents would make it longer.
- Bytes cost nothing; `overlap` and `prefetch` pay for launch and unroll only.
- Hosts differ: the same `sync` step took up to twice as long in another launch. No cost explains that.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from harness.command import check_out, default_is, parse_options, usage_errors, write_record
from harness.plots import COLOURS, subplots

SCHEDULES = ("sync", "merged", "overlap", "prefetch")
CP_SIZES = (2, 4, 8, 16, 32, 64, 128)
FIT_DOCUMENTS = (1, 32)  # numbers of documents (1: dense) of the records to fit to; the others are held out
EXTRAPOLATED, TENSORS = "h4096-train", 4  # the step; tensors of a batch
HOST = ("roll of sync", "message of sync", "microbatch", "exchange")
DEVICE = ("message of sync", "blocking exchange", "unroll")
Array = npt.NDArray[np.float64]
Costs = dict[str, dict[str, float]]  # in µs: "host", "device", and "slack" by step


@dataclass(frozen=True)
class Options:
    """Which records to fit."""

    fast: tuple[Path, ...]
    """Folders with the records of the fast link."""
    slow: Annotated[tuple[Path, ...], default_is("no slow link")] = ()
    """Folders with the records of the slow link."""
    out: Path = Path("out/scaling_model")
    """Folder for the record and the picture."""


@dataclass(frozen=True)
class Measured:
    """A schedule in a recorded comparison. Times are what it adds to `prepared`, in µs."""

    run: str
    step: str  # size and direction
    schedule: str
    cp_size: int
    depths: int
    documents: int  # 1: dense
    floor_us: float  # the step of `prepared`
    host_us: float
    stall_us: float
    step_delta_us: float

    def counts(self) -> tuple[Array, Array]:
        """Return how often a rank pays each HOST cost and each DEVICE cost in a step."""
        neighbours = 1 if self.cp_size == 2 else 2
        exchanges = 1 if self.schedule == "prefetch" else self.depths
        if self.schedule == "sync":
            rolls = TENSORS * self.depths
            messages = rolls * self.documents * neighbours
            return np.array([rolls, messages, 0.0, 0]), np.array([messages, 0.0, 0])
        blocking = exchanges * neighbours if self.schedule == "merged" else 0
        return np.array([0.0, 0, 1, exchanges]), np.array([0.0, blocking, exchanges])

    def predict(self, costs: Costs) -> float:
        """Return what the exchange should add to the step, in µs."""
        counts = zip(self.counts(), ("host", "device"), strict=True)
        host, device = (float(one @ list(costs[kind].values())) for one, kind in counts)
        return max(host - costs["slack"].get(self.step, 0.0), device)


def fit(measured: list[Measured]) -> Costs:
    """Fit the costs of a link. Raises ValueError if there is nothing to fit to."""
    if not measured:
        raise ValueError("no record to fit to: one of a dense step or of 32 documents is needed")
    slack = dict.fromkeys([one.step for one in measured], 0.0)
    for one in measured:
        slack[one.step] = max(slack[one.step], one.host_us - one.step_delta_us)
    hidden = [one for one in measured if one.host_us <= slack[one.step]]  # stalls of the device alone
    host = _nnls([one.counts()[0] for one in measured], [one.host_us for one in measured])
    device = _nnls([one.counts()[1] for one in hidden], [one.stall_us for one in hidden])
    named = {"host": dict(zip(HOST, host, strict=True)), "device": dict(zip(DEVICE, device, strict=True))}
    return {**named, "slack": slack}


def _nnls(counts: list[Array], values: list[float]) -> list[float]:
    """Minimise relative errors: hundreds of messages must not outweigh one exchange."""
    weights = 1 / np.maximum(values, 1.0)
    return list(nnls(np.array(counts) * weights[:, None], values * weights)[0].tolist())


def read(folders: tuple[Path, ...]) -> list[Measured]:
    """Read the comparisons of eager steps on GPUs. Raises ValueError if a folder has none."""
    measured: list[Measured] = []
    for folder in folders:
        found: list[Measured] = []
        for path in sorted(folder.glob("*.json")):
            try:
                record = json.loads(path.read_text())
                if record.get("experiment") == "compare_modes" and not record["settings"]["captured"]:
                    found += _rows_of(path.stem, record)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} is not a record of sweep.py: {error!r}") from None
        if not found:
            raise ValueError(f"{folder} must hold records of sweep.py made on GPUs, found none")
        measured += found
    return measured


def _rows_of(run: str, record: dict[str, Any]) -> list[Measured]:
    settings, rows = record["settings"], record["rows"]
    floor, model = rows["prepared"], settings["model"]
    step = f"h{model['hidden_size']}-{'forward' if settings['forward_only'] else 'train'}"
    load = (record["where"]["ranks"], model["num_depths"], settings["num_documents"] or 1)
    found = []
    for schedule in SCHEDULES:
        row = rows.get(schedule, rows.get(f"{schedule}:process_group"))
        if row is not None and row["stall_us"] is not None:
            host, stall = row["host_us"] - floor["host_us"], row["stall_us"]["value"]
            times = (1000 * floor["median_ms"], host, stall, row["step_delta_us"]["value"])
            found.append(Measured(run, step, schedule, *load, *times))
    return found


def describe(measured: list[Measured]) -> dict[str, Any]:
    """Fit one link; return its costs, all predictions, their errors, and shares of a step by cp size."""
    costs = fit([one for one in measured if one.documents in FIT_DOCUMENTS])
    rows, shares, errors = [], {}, {}
    for one in measured:
        predicted, known = one.predict(costs), "fit" if one.documents in FIT_DOCUMENTS else "held out"
        error = (predicted - one.step_delta_us) / (one.floor_us + one.step_delta_us)
        rows.append({**asdict(one), "set": known, "predicted_us": predicted, "error_of_step": error})
        if one.step == EXTRAPOLATED and one.documents in FIT_DOCUMENTS:
            grow = [one.documents * size // one.cp_size if one.documents > 1 else 1 for size in CP_SIZES]
            grown = [replace(one, cp_size=n, documents=d) for n, d in zip(CP_SIZES, grow, strict=True)]
            kind = "dense" if one.documents == 1 else f"{32 // one.cp_size} documents a rank"
            deltas = [size.predict(costs) for size in grown]
            shares[f"{one.schedule}, {kind}"] = [delta / (one.floor_us + delta) for delta in deltas]
    for known in sorted({row["set"] for row in rows}):
        off = [abs(row["error_of_step"]) for row in rows if row["set"] == known]
        errors[known] = {"rows": len(off), "median": float(np.median(off)), "largest": max(off)}
    return {"costs_us": costs, "errors_of_step": errors, "shares": shares, "rows": rows}


def draw(links: dict[str, Any], path: Path) -> None:
    """Draw predicted against measured, and shares by cp size, for each link."""
    figure, grid = subplots(len(links), 2, (9, 3.6 * len(links)))
    for (name, link), (checked, shares) in zip(links.items(), grid, strict=True):
        for schedule in SCHEDULES:
            rows = [row for row in link["rows"] if row["schedule"] == schedule]
            x, y = [row["step_delta_us"] for row in rows], [row["predicted_us"] for row in rows]
            checked.scatter(x, y, s=14, color=COLOURS[schedule], label=schedule)
        checked.plot([-1e3, 0, 3e4], [-1e3, 0, 3e4], color="black", linewidth=0.8)
        checked.set(xlabel="step delta, measured (µs)", ylabel="predicted (µs)")
        checked.set_xscale("symlog", linthresh=1e3)
        checked.set_yscale("symlog", linthresh=1e3)
        checked.set(xticks=(-1e3, 0, 1e3, 1e4), yticks=(-1e3, 0, 1e3, 1e4))
        checked.set_title(f"{name} link: {len(link['rows'])} recorded steps", fontsize=9)
        checked.legend(fontsize=7)
        for label, values in link["shares"].items():
            style = ":" if label.endswith("dense") else "-"
            shares.plot(CP_SIZES, values, style, color=COLOURS[label.split(",")[0]], marker="o", label=label)
        shares.set(xscale="log", yscale="log", ylim=(1e-6, 1), xlabel="cp size", ylabel="share of the step")
        shares.set_xticks(CP_SIZES, [str(size) for size in CP_SIZES])
        shares.set_title(f"{name} link: {EXTRAPOLATED}, above 2 ranks extrapolated", fontsize=9)
        shares.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=130)


def main() -> None:
    options = parse_options(Options, "Fit a cost model of the exchange to records and extrapolate it.")
    with usage_errors():
        given = {"fast": options.fast, "slow": options.slow}
        known = {name: read(folders) for name, folders in given.items() if folders}
        links = {name: describe(rows) for name, rows in known.items()}
        check_out(options.out, "scaling_model.json", "scaling_model.png")
    path = write_record({"experiment": "scaling_model", "links": links}, options.out / "scaling_model.json")
    draw(links, path.with_suffix(".png"))
    for name, link in links.items():
        print(f"{name} link:", json.dumps([link["costs_us"], link["errors_of_step"]], indent=1))
    print(f"wrote {path}, {path.with_suffix('.png')}; everything above the recorded cp sizes is extrapolated")


if __name__ == "__main__":
    main()
