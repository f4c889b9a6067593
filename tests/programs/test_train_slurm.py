"""experiments/train.slurm with stand-ins for Slurm's commands and for the ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments/train.slurm"
# srun starts two tasks and passes signals on to them.
SRUN = """#!/usr/bin/env bash
[[ $1 == --* ]] && shift
trap 'told=yes; kill -USR1 "${tasks[@]}"' USR1
trap 'told=yes; kill -TERM "${tasks[@]}"' TERM
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do
    while true; do  # again if a signal has ended `wait`
        told=; wait "$task"; status=$?
        [[ $told ]] || break
    done
done
exit "$status"
"""
SCONTROL = '#!/usr/bin/env bash\n[[ $1 == show ]] && echo first-host || echo "scontrol $*"\n'
# A rank says what it was given, waits for SIGUSR1 or ends at once, and takes a moment to save.
RANK = """#!/usr/bin/env bash
trap 'sleep 0.2; exit '"$STATUS" USR1 TERM
echo "rank $RANK $LOCAL_RANK of $WORLD_SIZE $LOCAL_WORLD_SIZE, $MASTER_ADDR:$MASTER_PORT $OVERLAP_MTP_RUN_TOKEN: $*"
[[ $ENDS ]] && exit "$STATUS"
while :; do sleep 0.01; done
"""


@pytest.mark.parametrize(
    ("told", "status", "requeued"),
    [
        (signal.SIGUSR1, 0, True),
        (signal.SIGUSR1, 70, False),
        (signal.SIGTERM, 0, False),
        (None, 0, False),
        (None, 70, False),
    ],
)
def test_a_job_that_has_saved_before_its_time_was_over_is_queued_again(tmp_path, told, status, requeued):
    ends = "" if told else "by itself"
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "rank": RANK}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "hosts", "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7"}
    slurm |= {"PYTHON": str(tmp_path / "rank"), "ENDS": ends, "STATUS": str(status)}
    output = tmp_path / "output"
    with output.open("w") as file:
        job = subprocess.Popen(
            ["bash", str(SCRIPT), "--out", "a folder"],
            env=os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            stdout=file,
        )
    end = time.monotonic() + 20
    while len(output.read_text().splitlines()) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    if told:
        job.send_signal(told)
    assert job.wait(timeout=20) == status
    first, second, *rest = sorted(output.read_text().splitlines())
    token = first.split()[7].rstrip(":")
    for number, line in enumerate((first, second)):
        arguments = "experiments/train.py --resume --out a folder"
        assert line == f"rank {number} {number} of 2 2, first-host:20007 {token}: {arguments}"
    assert len(token) >= 32
    assert rest == (["scontrol requeue 7"] if requeued else [])
