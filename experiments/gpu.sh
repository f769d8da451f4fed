#!/bin/bash
# Everything that needs a GPU, within a time budget: bash experiments/gpu.sh [SECONDS] (default 1800)
#
# Nothing is downloaded: the real models' shapes train with random weights, the small model comes with the repository.
# In order, each with what is left of the budget: SD1.5 at 512 px and SDXL at 1024 px, full and LoRA, bf16, 200 steps
# (python -m workbench.throughput --measure), with and without torch.compile; python -m workbench.bench --quick; then
# the small model's default study and all runs behind the claims. Each step keeps what it has; one that runs out of time
# is ended by SIGTERM and said to be. Results: reports/gpu/.
#
# Variables, to try the script where there is no GPU:
#   PYTHON SHAPES VARIANTS DEVICE STEPS COMPILE BENCH_OPTIONS STUDY_OPTIONS CLAIMS_OPTIONS WORKERS OUT
set -uo pipefail                        # no -e: one step's failure does not end the others

BUDGET=${1:-1800}
case $BUDGET in '' | *[!0-9]*) echo "usage: $0 [SECONDS]" >&2; exit 2 ;; esac
PYTHON=${PYTHON:-python}
SHAPES=${SHAPES:-sd15 sdxl}
VARIANTS=${VARIANTS:-full lora}
DEVICE=${DEVICE:-cuda}
STEPS=${STEPS:-200}
WORKERS=${WORKERS:-4}                   # processes that share the GPU: the small model fills no GPU alone
COMPILE=${COMPILE---compile}
BENCH_OPTIONS=${BENCH_OPTIONS:---quick}
STUDY_OPTIONS=${STUDY_OPTIONS:-}
CLAIMS_OPTIONS=${CLAIMS_OPTIONS:-}
OUT=${OUT:-reports/gpu}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export MLFLOW_TRACKING_URI=${MLFLOW_TRACKING_URI:-sqlite:///$OUT/mlflow.db}
export WORKBENCH_STORAGE=${WORKBENCH_STORAGE:-sqlite:///$OUT/optuna.db}

FAILED=0
step() {                                # step NAME COMMAND...: within what is left, its output kept
    local name=$1 left=$((BUDGET - SECONDS)) code=0 begin=$SECONDS
    shift
    if [ "$left" -lt 10 ]; then
        echo "$name: not run, no time left" | tee -a "$OUT/steps.txt"
        FAILED=1
        return
    fi
    echo "== $name: $*"
    timeout --signal=TERM --kill-after=30 "$left" "$@" 2>&1 | tee "$OUT/$name.log" || code=$?
    case $code in
        0) echo "$name: done in $((SECONDS - begin)) s" ;;
        124 | 137) echo "$name: out of time after $((SECONDS - begin)) s; what it had is kept" ;;
        *) echo "$name: failed (exit code $code), see $name.log" ;;
    esac | tee -a "$OUT/steps.txt"
    [ "$code" -eq 0 ] || FAILED=1
}

: > "$OUT/steps.txt"
{ date -u; nvidia-smi 2>/dev/null || echo "no nvidia-smi here"; } > "$OUT/machine.txt"
for shape in $SHAPES; do
    for variant in $VARIANTS; do
        # shellcheck disable=SC2086  # the options are words
        step "throughput-$shape-$variant" "$PYTHON" -m workbench.throughput --measure $COMPILE \
            --shape "$shape" --variant "$variant" --device "$DEVICE" --steps "$STEPS" --out "$OUT/throughput-$shape-$variant"
    done
done
# shellcheck disable=SC2086
step bench "$PYTHON" -m workbench.bench --device "$DEVICE" --out "$OUT/bench" $BENCH_OPTIONS
# shellcheck disable=SC2086
step study "$PYTHON" -m workbench.sweep --study gpu --workers "$WORKERS" --set "model.device=$DEVICE" $STUDY_OPTIONS
# shellcheck disable=SC2086
step claims "$PYTHON" -m workbench.claims --study gpu-claims --workers "$WORKERS" --out "$OUT" \
    --set "model.device=$DEVICE" $CLAIMS_OPTIONS

{
    NAME=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 || true)
    echo "# Measured on ${NAME:-$DEVICE}"
    echo
    for table in "$OUT"/throughput-*/measured.md; do
        [ -f "$table" ] && { [ "$table" = "$(ls "$OUT"/throughput-*/measured.md | head -n 1)" ] && cat "$table" || tail -n +3 "$table"; }
    done
    echo
    [ -f "$OUT/bench/bench.md" ] && cat "$OUT/bench/bench.md"
    echo
    sed 's/^/- /' "$OUT/steps.txt"
} > "$OUT/summary.md"
cat "$OUT/summary.md"
exit "$FAILED"
