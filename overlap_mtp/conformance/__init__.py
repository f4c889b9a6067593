"""A conformance kit: does a roll do what multi-token prediction under context parallelism needs?

It runs any roll with Megatron-LM's signature against `roll_reference`, bit for bit, on a grid of layouts, dtypes,
shapes and depths. For each case it says whether the roll was right, wrong (where, and what it should have been),
refused, hung or crashed. Use it from the command line (`python -m overlap_mtp.conformance --help`), or call
`check_target` inside of your own ranks. Its limit: the cp group is the whole world, so it cannot see whether a roll
takes a rank of the cp group for a rank of the world.
"""

from overlap_mtp.conformance.cases import Case, cases_for
from overlap_mtp.conformance.outcome import Outcome
from overlap_mtp.conformance.run import check_target
from overlap_mtp.conformance.targets import FunctionTarget, PackedSeqParams, Target, load_target
from overlap_mtp.conformance.workers import ControlGroup, check_in_workers

__all__ = [
    "Case",
    "ControlGroup",
    "FunctionTarget",
    "Outcome",
    "PackedSeqParams",
    "Target",
    "cases_for",
    "check_in_workers",
    "check_target",
    "load_target",
]
