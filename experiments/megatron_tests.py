"""Do Megatron-LM's own tests of multi-token prediction end the same with the drop-in as without it?

    python experiments/megatron_tests.py --checkout CHECKOUT                         (GPUs, or CPU ranks over gloo)
    python experiments/megatron_tests.py --checkout CHECKOUT --ranks 1,2,4 --only Roll

Runs `tests/unit_tests/transformer/test_multi_token_prediction.py` of the checkout, unchanged, twice for each number of
ranks. A test may fail or be skipped, on few ranks or without Transformer Engine, if it does so both times. Prints which
tests end differently on any rank, and the totals. Exit status 1: one does, or a run came to no end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console

from harness.command import (
    Numbers,
    check_least,
    check_out,
    default_is,
    parse_options,
    usage_errors,
    write_record,
)
from harness.launch import check_gpus, check_no_launcher, choose_device
from harness.progress import Progress
from overlap_mtp.megatron.settings import Settings as DropInSettings

TESTS = Path("tests/unit_tests/transformer/test_multi_token_prediction.py")
ROOT = Path(__file__).resolve().parents[1]
Outcomes = dict[str, dict[str, Any]]  # by rank: what the plugin wrote


@dataclass(frozen=True)
class Options:
    """One run of the tests."""

    checkout: Path
    """Folder with a checkout of Megatron-LM."""
    ranks: Annotated[Numbers | None, default_is("1, 2 and 4, as far as there are GPUs; 1 and 2 on CPU")] = (
        None
    )
    """Ranks to start; the tests run once for each number."""
    device: Annotated[Literal["cuda", "cpu"] | None, default_is("cuda if there is a GPU")] = None
    """What the ranks run on."""
    schedule: str = "prefetch"
    """Schedule of the drop-in: sync, merged, batched, overlap or prefetch."""
    transport: Literal["auto", "process_group", "symmetric"] = "auto"
    """Transport of the drop-in."""
    only: Annotated[str | None, default_is("all tests")] = None
    """Tests to run, as an expression of pytest's -k."""
    stand_in: bool = False
    """Also run tests that need Transformer Engine to deal documents to ranks, with a function of ours in its place."""
    timeout: float = 900.0
    """Seconds for one run: then it is ended."""
    out: Path = Path("out/megatron_tests")
    """Folder for the record and pytest's output."""

    @property
    def all_ranks(self) -> tuple[int, ...]:
        """The numbers of ranks."""
        if self.ranks is not None:
            return self.ranks
        most = torch.cuda.device_count() if choose_device(self.device) == "cuda" else 2
        return tuple(count for count in (1, 2, 4) if count <= most)

    def check(self) -> None:
        """Raise ValueError for anything illegal."""
        check_no_launcher()
        check_least(self, timeout=1)
        DropInSettings(self.schedule, self.transport)  # raises if one is illegal
        if not (self.checkout / TESTS).is_file():
            raise ValueError(
                f"checkout must be a folder of Megatron-LM, got {self.checkout}: it has no {TESTS}"
            )
        for count in self.all_ranks:
            check_gpus(count, choose_device(self.device))


def run_tests(options: Options, ranks: int, with_drop_in: bool) -> Outcomes:
    """Run the tests under torchrun once.

    Returns:
        What each rank wrote, by its number. It is incomplete if the run came to no end.
    """
    on_cpu = choose_device(options.device) == "cpu"
    # Most tests call roll_tensor themselves: no forward announces what they roll.
    settings = {"schedule": options.schedule, "transport": options.transport, "unknown": "exact"}
    paths = [options.checkout.resolve(), ROOT, ROOT / "experiments", os.environ.get("PYTHONPATH")]
    name = f"{ranks}-ranks-{'with' if with_drop_in else 'without'}"
    with tempfile.TemporaryDirectory() as folder, (options.out / f"{name}.log").open("w") as log:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TORCH_COMPILE_DISABLE": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "OVERLAP_MTP_OUTCOMES": folder,
            "OVERLAP_MTP_DROP_IN": json.dumps(settings) if with_drop_in else "",
            "OVERLAP_MTP_ON_CPU": str(int(on_cpu)),
            "OVERLAP_MTP_PARTITION": str(int(options.stand_in)),
        }
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        pytest = ["-m", "pytest", "-p", "dropin.plugin", "-p", "no:cacheprovider", "-q", str(TESTS)]
        select = ["-k", options.only] if options.only else []
        command = [sys.executable, *launch, *pytest, *select]
        process = subprocess.Popen(
            command, cwd=options.checkout, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            process.wait(options.timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks
            process.wait()
        return {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank*.json"))}


def differences(without: Outcomes, with_drop_in: Outcomes) -> list[dict[str, str]]:
    """Return the tests whose outcomes differ, on any rank."""
    found = []
    for rank in sorted({*without, *with_drop_in}):
        own, ours = (run.get(rank, {}).get("outcomes", {}) for run in (without, with_drop_in))
        for test in sorted({*own, *ours}):
            before, after = (run.get(test, ["not run", ""]) for run in (own, ours))
            if before[0] != after[0]:
                found.append(
                    {"rank": rank, "test": test, "without": before[0], "with": after[0], "text": after[1]}
                )
    return found


def totals(run: Outcomes) -> dict[str, int]:
    """Return how many tests had each outcome on rank 0."""
    outcomes = run.get("rank0", {}).get("outcomes", {})
    return dict(Counter(outcome for outcome, _ in outcomes.values()))


def compare_on(options: Options, ranks: int, progress: Progress) -> dict[str, Any]:
    """Run the tests without and with the drop-in, print what differs, and return it for the record."""
    runs = []
    for with_it in (False, True):
        runs.append(run_tests(options, ranks, with_it))
        progress.advance()
    without, with_drop_in = runs
    row: dict[str, Any] = {
        "ranks": ranks,
        "without": totals(without),
        "with": totals(with_drop_in),
        "ended": len(without) == len(with_drop_in) == ranks,
        "differences": differences(without, with_drop_in),
        "status": with_drop_in.get("rank0", {}).get("status"),
    }
    for one in row["differences"]:
        print(f"  {one['rank']}: {one['test']}: {one['without']} without, {one['with']} with the drop-in")
    for name in ("without", "with"):
        print(
            f"{ranks} ranks, {name} the drop-in: {', '.join(f'{n} {what}' for what, n in row[name].items())}"
        )
    print(f"{ranks} ranks, the drop-in on rank 0: {row['status']}")
    if not row["ended"]:
        print(f"{ranks} ranks: NOT ALL RANKS CAME TO AN END, see the logs in {options.out}", flush=True)
    elif not row["differences"]:
        print(f"{ranks} ranks: no difference", flush=True)
    return row


def main() -> None:
    options = parse_options(
        Options, "Run Megatron-LM's own tests of multi-token prediction with and without the drop-in."
    )
    with usage_errors():
        options.check()
        check_out(options.out, "megatron_tests.json")
    with Progress(2 * len(options.all_ranks), "runs of the tests", Console()) as progress:
        rows = [compare_on(options, ranks, progress) for ranks in options.all_ranks]
    settings = {
        "device": choose_device(options.device),
        "schedule": options.schedule,
        "transport": options.transport,
        "only": options.only,
        "stand_in": options.stand_in,
    }
    record = {"experiment": "megatron_tests", "settings": settings, "rows": rows}
    write_record(record, options.out / "megatron_tests.json")
    sys.exit(not all(row["ended"] and not row["differences"] and row["without"] for row in rows))


if __name__ == "__main__":
    main()
