"""Reading the records of `compare_modes`, `sweep` and `roll_latency` back, as what the cost model is fitted to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cost_model import SCHEDULES, IsolatedExchange, Load, Measured, Step

Record = dict[str, Any]


def read_records(folders: list[Path]) -> dict[str, Record]:
    """Every record of the folders, by name; raises ValueError where a folder holds none."""
    records: dict[str, Record] = {}
    for folder in folders:
        paths = sorted(folder.glob("*.json"))
        found = {f"{folder.name}/{path.stem}": json.loads(path.read_text()) for path in paths}
        found = {name: one for name, one in found.items() if isinstance(one, dict) and "experiment" in one}
        if not plain_steps(found):
            raise ValueError(f"{folder} must hold records of sweep.py or compare_modes.py, found none")
        records |= found
    return records


def plain_steps(records: dict[str, Record]) -> dict[str, Record]:
    """The comparisons that the model is of."""
    return {name: one for name, one in records.items() if _is_plain(one)}


def transport_in(records: dict[str, Record], wanted: str) -> str:
    """ "auto" is symmetric memory where any comparison ran over it, else the process group."""
    if wanted != "auto":
        return wanted
    ran = {transport for one in plain_steps(records).values() for transport in _transports(one).values()}
    return "symmetric" if "symmetric" in ran else "process_group"


def _transports(record: Record) -> dict[str, str]:
    """What each mode of a comparison ran over; before records said so, it was the process group."""
    said = record.get("transport", {})
    return {mode: said.get(mode) or "process_group" for mode in record["rows"]}


def _is_plain(record: Record) -> bool:
    """A zigzag comparison of eager steps of one row: the others have host costs of their own."""
    settings = record.get("settings", {})
    return (
        record["experiment"] == "compare_modes"
        and settings["layout"] == "zigzag"
        and settings["batch_size"] == 1
        and not (settings.get("compiled") or settings.get("captured"))
    )


def documents_of(record: Record) -> int:
    """1 for a dense sequence."""
    return int(record["settings"]["num_documents"] or 1)


def measured_in(records: dict[str, Record], fit_documents: set[int], transport: str) -> list[Measured]:
    """All schedules of all comparisons, those with a packed exchange over `transport`.

    Held out: other documents than `fit_documents`, and more ranks than the fewest.
    """
    plain = plain_steps(records)
    fewest = min(one["where"]["ranks"] for one in plain.values())
    measured = []
    for name, record in plain.items():
        step = step_of(record, list(plain.values()))
        held_out = documents_of(record) not in fit_documents or record["where"]["ranks"] != fewest
        for mode, ran_over in _transports(record).items():
            schedule = mode.partition(":")[0]  # "prefetch:process_group" names a transport too
            if schedule in SCHEDULES and (schedule == "sync" or ran_over == transport):
                exposed = record["rows"][mode]["step_delta_us"]
                measured.append(
                    Measured(
                        name,
                        load_of(record, schedule),
                        step,
                        exposed["value"],
                        exposed["low"],
                        exposed["high"],
                        _host_us(record, mode),
                        held_out,
                    )
                )
    return measured


def _host_us(record: Record, mode: str) -> float:
    """Host time of a mode, more than `prepared` has."""
    rows = record["rows"]
    return float(max(0.0, rows[mode]["host_us"] - rows["prepared"]["host_us"]))


def load_of(record: Record, schedule: str) -> Load:
    settings = record["settings"]
    depths = settings["model"]["num_depths"]
    return Load(schedule, record["where"]["ranks"], depths, documents_of(record), settings["max_documents"])


def step_of(record: Record, among: list[Record]) -> Step:
    """The `prepared` step of a comparison.

    Its forward pass is that of the same comparison forward only, where it was run, else a third of forward and
    backward. How long launching it takes is known from the comparison with the least time a layer: on small
    models the host bounds the step.
    """
    alike = [one for one in among if _alike(one, record)]
    forward_us = _forward_us(record, alike)
    a_layer = min(_forward_us(one, alike) / _layers(one) for one in alike)
    model = record["settings"]["model"]
    layer, mtp_layer, head = _multiplications(model)
    forward = model["num_layers"] * layer + model["num_depths"] * mtp_layer + (1 + model["num_depths"]) * head
    return Step(
        1000 * record["rows"]["prepared"]["median_ms"],
        forward_us,
        a_layer * _layers(record),
        1 - (mtp_layer + head) / forward,
        (model["num_layers"] - 1) * layer / forward,
        (mtp_layer + head) / forward,
    )


def _alike(one: Record, other: Record) -> bool:
    return documents_of(one) == documents_of(other) and one["where"]["ranks"] == other["where"]["ranks"]


def _forward_us(record: Record, alike: list[Record]) -> float:
    for one in alike:
        if one["settings"]["forward_only"] and one["settings"]["model"] == record["settings"]["model"]:
            return float(1000 * one["rows"]["prepared"]["median_ms"])
    return float(1000 * record["rows"]["prepared"]["median_ms"]) / 3


def _layers(record: Record) -> int:
    model = record["settings"]["model"]
    return int(model["num_layers"] + model["num_depths"])


def _multiplications(model: Record) -> tuple[int, int, int]:
    """Of a token, in a trunk layer, an MTP layer and a head; attention's own grow with the sequence: left out."""
    hidden = model["hidden_size"]
    heads = 2 * model["num_heads"] + 2 * model["num_kv_heads"]  # query, output, key and value
    layer = hidden * (hidden // model["num_heads"] * heads + 3 * model["ffn_size"])
    return layer, layer + 2 * hidden * hidden, hidden * model["vocab_size"]


def isolated_in(records: dict[str, Record], transport: str) -> list[IsolatedExchange]:
    """Packed exchanges isolated over `transport`, on the fewest ranks that they were timed on."""
    rows = [
        row
        for record in records.values()
        if record["experiment"] == "roll_latency"
        for row in record["rows"]
        if row["failed"] is None and row["transport"] == transport and row["schedule"] in SCHEDULES
    ]
    fewest = min((row["cp_size"] for row in rows), default=0)
    return [_alone(row) for row in rows if row["cp_size"] == fewest]


def _alone(row: Record) -> IsolatedExchange:
    load = Load(row["schedule"], row["cp_size"], row["depths"], row["documents"])
    gpu = row["gpu_us"]
    doubt = max((gpu["high"] - gpu["low"]) / 2, gpu["median"] / 20) if gpu else 0.0
    return IsolatedExchange(
        load, row["messages"], row["bytes"], row["host_us"]["median"], gpu and gpu["median"], doubt
    )
