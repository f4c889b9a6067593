"""The command line of the conformance kit. `python -m overlap_mtp.conformance --help` says how to use it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from overlap_mtp.conformance.cases import Case, cases_for
from overlap_mtp.conformance.outcome import RESULTS, Outcome
from overlap_mtp.conformance.targets import MEGATRON, load_target
from overlap_mtp.conformance.workers import ControlGroup, check_in_workers
from overlap_mtp.layout import KINDS

DESCRIPTION = """\
Check that a roll does what multi-token prediction under context parallelism needs, bit for bit.

  python -m overlap_mtp.conformance overlap_mtp --ranks 1 2 4
  python -m overlap_mtp.conformance my_framework.mtp:roll_tensor --layout zigzag --quick
  torchrun --nproc-per-node 8 -m overlap_mtp.conformance megatron --device cuda

TARGET is megatron, overlap_mtp, or module:function, a function with the signature of Megatron-LM's roll_tensor:
(tensor, shifts, dims, cp_group, packed_seq_params) -> (rolled, sum), or without the sum. It is called with shifts=-1,
once for each depth. If it has a parameter `layout`, it gets the SequenceLayout, too. Megatron-LM's arguments cannot say
how the sequence is cut: check a roll for one cut with --layout.
"""
EPILOG = """\
Each line is a case: right; wrong (how many tokens, where, and what was expected); refused (it raised); hung (it took
longer than --deadline); crashed (its process ended). The status is 0 if all cases are right, 1 if not, 2 if the command
is not valid.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Illegal options end the process with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m overlap_mtp.conformance",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="TARGET", help="megatron, overlap_mtp or module:function")
    parser.add_argument("--schedule", default="prefetch", help="of overlap_mtp (default: %(default)s)")
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        metavar="N",
        help="numbers of ranks to start, without torchrun (default: 2)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="leave out a third of the cases")
    parser.add_argument(
        "--layout", choices=KINDS, help="run the cases of this layout; Megatron-LM's is zigzag"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="run the cases whose names hold this")
    parser.add_argument(
        "--deadline", type=float, default=30, metavar="S", help="of a case (default: %(default)s s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all outcomes there")
    options = parser.parse_args(arguments)
    if options.json:
        try:
            options.json.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--json: {error}")
    is_under_torchrun = "RANK" in os.environ
    if is_under_torchrun and options.ranks:
        parser.error("--ranks starts ranks, and torchrun has done so: leave it out")
    options.ranks = options.ranks or [int(os.environ.get("WORLD_SIZE", 1)) if is_under_torchrun else 2]
    if min(options.ranks) < 1:
        parser.error(f"--ranks must be at least 1, got {min(options.ranks)}")
    if not options.deadline > 0:
        parser.error(f"--deadline must be positive, got {options.deadline:g}")
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if is_under_torchrun else max(options.ranks)
    if options.device == "cuda" and here > torch.cuda.device_count():
        parser.error(
            f"--device cuda needs a GPU for each rank, got {here} ranks and {torch.cuda.device_count()} GPUs"
        )
    if not any(select(cp_size, options) for cp_size in options.ranks):
        parser.error(f"--only {options.only!r} is in the name of no case")
    return options


def select(cp_size: int, options: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for."""
    cases = cases_for(cp_size, options.quick)
    if options.layout:
        cases = [case for case in cases if case.layouts[0].kind == options.layout]
    return [case for case in cases if options.only in case.name]


def summary(cp_size: int, outcomes: list[Outcome]) -> str:
    """How many cases came to what."""
    counts = Counter(one.result for one in outcomes)
    return f"{_ranks(cp_size)}: " + ", ".join(f"{counts[result]} {result}" for result in RESULTS)


def check(options: argparse.Namespace) -> int:
    """Run the cases, print and write what came of them, and return the exit status."""
    is_under_torchrun = "RANK" in os.environ
    speaks = not is_under_torchrun or dist.get_rank() == 0
    runs = {}
    for cp_size in options.ranks:
        control = ControlGroup.of_torchrun() if is_under_torchrun else ControlGroup.here(cp_size)
        cases = select(cp_size, options)
        width = max((len(case.name) for case in cases), default=0)

        def show(one: Outcome, width: int = width) -> None:
            if speaks:
                print(f"{one.result:8} {one.case:{width}}  {one.detail}".rstrip(), flush=True)

        if speaks:
            print(
                f"\n{options.target} on {_ranks(cp_size)}, {options.device}: {len(cases)} cases", flush=True
            )
        how = (options.target, options.schedule, options.device, options.deadline)
        runs[cp_size] = check_in_workers(control, cases, *how, on_outcome=show)
    if speaks:
        print("\n" + "\n".join(summary(*run) for run in runs.items()))
        if options.json:
            write(options, runs)
    if is_under_torchrun:
        dist.barrier()  # torchrun ends the others as soon as one ends with status 1
    return 0 if all(one.is_right for outcomes in runs.values() for one in outcomes) else 1


def write(options: argparse.Namespace, runs: dict[int, list[Outcome]]) -> None:
    """Write all outcomes, and what they are of, as JSON."""
    record = {
        "target": options.target,
        "schedule": options.schedule if options.target == "overlap_mtp" else None,
        "device": options.device,
        "torch": torch.__version__,
        "runs": [
            {"ranks": cp_size, "outcomes": [one.as_dict() for one in outcomes]}
            for cp_size, outcomes in runs.items()
        ],
    }
    options.json.write_text(json.dumps(record, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 if all cases are right, 1 if not, 2 if the command makes no sense."""
    options = parse(arguments)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    try:
        if options.target != MEGATRON:  # here, so that a wrong one is said before any case
            load_target(options.target, options.schedule)
        return check(options)
    except ValueError as error:
        print(f"python -m overlap_mtp.conformance: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _ranks(cp_size: int) -> str:
    return f"{cp_size} rank{'s' * (cp_size > 1)}"


if __name__ == "__main__":
    sys.exit(main())
