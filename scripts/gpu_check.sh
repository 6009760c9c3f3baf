#!/usr/bin/env bash
# Check and time everything on a machine with an NVIDIA GPU, in under 10 minutes:
#
#     scripts/gpu_check.sh [FOLDER [STEP...]]      FOLDER gets the results, benchmarks/gpu unless named; STEP: some only
#
#   tests        tests.txt: pytest -m gpu: parity of the kernels with float64, repeatability, streams, graphs, whole runs
#   tiles        tiles.txt, tiles.json: the Triton kernels with other tiles, at the four shapes of a ResNet
#   shift_conv   shift_conv_*.txt, .json: the implementations of the convolution path, at the same shapes
#   suite        RESULTS.md, results-cuda-*.json: the benchmark suite
#
# Installs nothing and needs no network. PYTHON names the interpreter (python3), AUTHORS a clone of the authors' code for
# the rows that compare with it. Every step runs even when one before it failed; the exit status is then 1. 2: no GPU.
set -uo pipefail
trap '' PIPE  # with tee -p: a reader that ends stops nothing
out=${1:+$(realpath -m "$1")}
steps=${*:2}
steps=${steps:-tests tiles shift_conv suite}
cd "$(dirname "$0")/.."
out=${out:-benchmarks/gpu}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=()
limit=560  # seconds for all of it

for name in $steps; do
    if [[ " tests tiles shift_conv suite " != *" $name "* ]]; then
        echo "error: there is no step $name; choose tests, tiles, shift_conv or suite" >&2
        exit 2
    fi
done
if ! "$python" -c 'import torch; raise SystemExit(0 if torch.cuda.is_available() else 2)'; then
    echo "error: $python sees no CUDA device (or no torch); this check needs both" >&2
    exit 2
fi
if ! mkdir -p "$out" || ! touch "$out/tests.txt"; then
    echo "error: cannot write to $out; choose another FOLDER" >&2
    exit 2
fi

# step NAME SECONDS COMMAND...: output to the screen and NAME.txt; a step past its time is stopped and counts as failed
step() {
    local name=$1 most=$2 start=$SECONDS
    shift 2
    [[ " $steps " == *" ${name%_*x*} "* ]] || return 0
    echo "== $name (at most ${most}s)"
    timeout "$most" "$@" 2>&1 | tee -p "$out/$name.txt" || failed+=("$name")
    echo "== $name took $((SECONDS - start))s"
}

"$python" -c 'import torch, triton; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)' \
    | tee -p "$out/machine.txt"

parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n auto --maxprocesses 14)
step tests 200 "$python" -m pytest -q -m gpu "${parallel[@]}" -p no:cacheprovider
step tiles 110 "$python" -m benchmarks.tune_triton --seconds 70 --json "$out/tiles.json"
for shape in 64x56 128x28 256x14 512x7; do
    step "shift_conv_$shape" 25 "$python" scripts/benchmark.py "shift_conv:$shape" --impl triton,folded,dense --device cuda \
        --dtype bf16 --channels-last --batch-size 128 --seconds 2 --json "$out/shift_conv_$shape.json"
done
step suite $((limit - SECONDS)) "$python" scripts/benchmark.py --suite --device cuda --seconds 4 --out "$out" \
    ${AUTHORS:+--authors "$AUTHORS"}

if ((${#failed[@]})); then
    echo "FAILED: ${failed[*]} (see $out)" >&2
    exit 1
fi
echo "All steps passed in ${SECONDS}s; results in $out"
exit 0
