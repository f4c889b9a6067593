#!/usr/bin/env bash
# Record a short run of experiments/compare_modes.py, one process for each GPU, and keep the small part of the profile
# that profiles/report.py reads, without environment, host name or paths.
#
#   profiles/capture.sh OUT.sqlite.gz [arguments of compare_modes]
#   profiles/capture.sh profiles/h4096.sqlite.gz --preset h4096 --documents 8 --rounds 2 --warmup 3
#   profiles/capture.sh --torch-profiler profiles/h4096 --preset h4096 --rounds 2      (if there is no nsys)
#
# Beside the profile it writes a page (.html) with the comparison and the timeline of its steps.
# The full report, for the GUI of Nsight Systems, stays in out/profiles; it holds the environment of the machine.
# With --torch-profiler, OUT is a folder that gets one trace for each rank, and loses those of other ranks.
# Environment variables: PYTHON (default .venv/bin/python, else python3), NSYS (the nsys to use), PROGRAM (to record
# another one than compare_modes, which takes the same --profile: experiments/megatron_step.py).
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; }
fail() { echo "error: $*" >&2; exit 2; }

# Find nsys on the PATH, or else the newest one of the packages Nsight Systems, Nsight Compute and CUDA toolkit.
find_nsys() {
    if [[ -n ${NSYS:-} ]]; then echo "$NSYS"; return; fi
    if command -v nsys; then return; fi
    local place
    for place in /opt/nvidia/nsight-systems/*/bin /opt/nvidia/nsight-systems-cli/*/bin /usr/local/cuda*/bin \
        /opt/nvidia/nsight-systems*/*/target-linux-* /opt/nvidia/nsight-compute/*/host/target-linux-*; do
        if [[ -x $place/nsys ]]; then echo "$place/nsys"; fi
    done | sort -V | tail -1
}

use_torch=false
if [[ ${1:-} == --torch-profiler ]]; then use_torch=true; shift; fi
if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage; exit 0; fi
if [[ $# -lt 1 || $1 == -* ]]; then usage >&2; exit 2; fi
out=$1; shift
[[ $out == /* ]] || out=$PWD/$out

python=${PYTHON:-$root/.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
program=${PROGRAM:-experiments/compare_modes.py}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"

# Write the page of the run with the timeline of these profiles, if it is a comparison and wrote its record here.
write_page() {
    local page=$1; shift
    if [[ $program != */compare_modes.py || ! -e $work/compare/results.json ]]; then return; fi
    "$python" profiles/report.py "$@" --plot "$work/timeline.png" >/dev/null
    "$python" experiments/comparison_report.py "$work/compare/results.json" --timeline "$work/timeline.png" \
        >/dev/null
    mv "$work/compare/report.html" "$page"
    echo "wrote $page"
}

if $use_torch; then
    folder=${out%.gz}; folder=${folder%.sqlite}; folder=${folder%.json}
    "$python" "$program" --out "$work/compare" --profile torch --profile-out "$work" "$@"
    traces=("$work"/rank*.json.gz)
    [[ -e ${traces[0]} ]] || fail "$program wrote no trace"
    # A report on the folder would mix traces of an earlier run with those of this one.
    for old in "$folder"/rank[0-9]*.json.gz; do
        [[ -e $work/${old##*/} ]] || rm -f "$old"
    done
    for trace in "${traces[@]}"; do
        "$python" -m overlap_mtp.profiling.shrink "$trace" "$folder/${trace##*/}"
        echo "wrote $folder/${trace##*/}"
    done
    write_page "$folder/report.html" "${traces[@]/#$work/$folder}"
    exit
fi

nsys=$(find_nsys)
[[ -n $nsys ]] || fail "nsys is neither on the PATH nor where NVIDIA's packages put it: install the package" \
    "nsight-systems-cli (https://developer.nvidia.com/nsight-systems), or use --torch-profiler"
"$nsys" --version >/dev/null || fail "$nsys does not start: if it is the one of Nsight Compute, install libdw1 and libelf1"

name=$(basename "$out"); name=${name%.gz}; name=${name%.sqlite}
full=$root/out/profiles/$name
mkdir -p "$root/out/profiles"
rm -f "$full.nsys-rep"
# --sample=none and --cpuctxsw=none make the report a hundred times smaller. Node tracing is what puts the kernels of
# CUDA graphs into it. The program starts and stops the capture, which is the timed rounds.
"$nsys" profile -t cuda,nvtx --sample=none --cpuctxsw=none --cuda-event-trace=false --cuda-graph-trace=node \
    --capture-range=cudaProfilerApi --capture-range-end=stop -f true -o "$full" \
    "$python" "$program" --out "$work/compare" --profile nsys --profile-out "$work" "$@"
[[ -e $full.nsys-rep ]] || fail "nsys wrote no report: the run has to reach its timed rounds, on a GPU"
"$nsys" export --type sqlite -f true -o "$work/full.sqlite" "$full.nsys-rep"
"$python" -m overlap_mtp.profiling.shrink "$work/full.sqlite" "$out"
echo "wrote $out (for profiles/report.py) and out/profiles/$name.nsys-rep (for the GUI)"
write_page "${out%/*}/$name.html" "$out"
