#!/bin/bash
# What the real models cost on this machine's GPU, within a time budget: bash experiments/gpu.sh [SECONDS] (default 570)
#
# Nothing is downloaded: the real models' shapes train with random weights on random pairs, the small model comes with the
# repository. torch, diffusers, transformers, accelerate, peft, safetensors, pyarrow, pillow, numpy, click, pydantic,
# tqdm, filelock and psutil are enough; neither MLflow nor Optuna is needed.
#
# The most valuable measurements come first. Each step has a limit of its own and of what is left of the budget, and
# keeps what it has when it runs out of time. Results: reports/gpu/, a folder a step, and summary.md over all.
#
# Variables, to try the script where there is no GPU (all steps on the tiny shape):
#   PYTHON=python DEVICE=cpu SMALL=tiny LARGE=tiny PART=tiny STEPS=4 LARGE_STEPS=4 MANY_STEPS=8 PATIENCE=10 TRAIN_OPTIONS="--set train.steps=2" OUT=reports/gpu
set -uo pipefail                        # no -e: one step's failure does not end the others

BUDGET=${1:-570}
case $BUDGET in '' | *[!0-9]*) echo "usage: $0 [SECONDS]" >&2; exit 2 ;; esac
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
SMALL=${SMALL:-sd15}                    # 512 px
LARGE=${LARGE:-sdxl}                    # 1024 px
PART=${PART:-flux1-part}                # 1024 px; FLUX.1 with fewer layers: scale its times by the FLOPs of a pair
STEPS=${STEPS:-32}
LARGE_STEPS=${LARGE_STEPS:-16}
MANY_STEPS=${MANY_STEPS:-200}
PATIENCE=${PATIENCE:-1}                 # times each step's limit
TRAIN_OPTIONS=${TRAIN_OPTIONS:-}
OUT=${OUT:-reports/gpu}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)

FAILED=0
step() {                                # step NAME LIMIT COMMAND...: its output kept in NAME.log
    local name=$1 limit=$(($2 * PATIENCE)) left=$((BUDGET - SECONDS)) code=0 begin=$SECONDS
    shift 2
    if [ "$left" -lt 10 ]; then
        echo "$name: not run, no time left" | tee -a "$OUT/steps.txt"
        FAILED=1
        return
    fi
    echo "== $name: $*"
    timeout --signal=TERM --kill-after=15 "$((limit < left ? limit : left))" "$@" 2>&1 | tee "$OUT/$name.log" || code=$?
    case $code in
        0) echo "$name: done in $((SECONDS - begin)) s" ;;
        124 | 137) echo "$name: out of time after $((SECONDS - begin)) s; what it had is kept" ;;
        *) echo "$name: failed (exit code $code), see $name.log" ;;
    esac | tee -a "$OUT/steps.txt"
    [ "$code" -eq 0 ] || FAILED=1
    summary
}

measure() {                             # measure NAME LIMIT SHAPE VARIANT STEPS OPTIONS...
    local name=$1 limit=$2 shape=$3 variant=$4 steps=$5
    shift 5
    step "$name" "$limit" "$PYTHON" -m workbench.throughput --measure --shape "$shape" --variant "$variant" \
        --steps "$steps" --device "$DEVICE" --out "$OUT/$name" "$@"
}

train() {                               # train NAME LIMIT EXPERIMENT OPTIONS...
    local name=$1 limit=$2
    shift 2
    # shellcheck disable=SC2086  # the options are words
    step "$name" "$limit" "$PYTHON" -m workbench.train "$@" --no-tracking --output "$OUT/$name" \
        --set "model.device=$DEVICE" $TRAIN_OPTIONS
}

summary() {                             # anew after each step, so that it is there whenever the budget ends
    {
        NAME=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 || true)
        echo "# Measured on ${NAME:-$DEVICE}"
        echo
        local first=1 table
        for table in "$OUT"/*/measured.md; do
            [ -f "$table" ] || continue
            if [ "$first" ]; then cat "$table"; else tail -n +3 "$table"; fi
            first=
        done
        echo
        sed 's/^/- /' "$OUT/steps.txt"
        [ -f "$OUT/profile/profile.md" ] && { echo; head -n 30 "$OUT/profile/profile.md"; }
    } > "$OUT/summary.md"
}

slowest() {                             # SHAPE VARIANT PAIRS of the smallest share of the matrix rate without compiling
    "$PYTHON" - "$OUT" <<'PYTHON'
import json, pathlib, sys
rows = [row for path in pathlib.Path(sys.argv[1]).glob("*/measured.json") for row in json.loads(path.read_text())]
rows = [row for row in rows if row["share"] and row["compile"] == "no"]
row = min(rows, key=lambda row: float(row["share"].rstrip("%")))
print(row["shape"], 8 if row["variant"] == "lora" else 0, max(1, row["batch"] // 4))
PYTHON
}

: > "$OUT/steps.txt"
{ date -u; nvidia-smi 2>/dev/null || echo "no nvidia-smi here"; "$PYTHON" --version; } > "$OUT/machine.txt"

measure "$SMALL-full" 60 "$SMALL" full "$STEPS"
measure "$SMALL-lora" 70 "$SMALL" lora "$STEPS"
measure "$PART-lora" 60 "$PART" lora "$LARGE_STEPS"
measure "$LARGE-lora" 90 "$LARGE" lora "$LARGE_STEPS"
if read -r shape rank pairs < <(slowest 2>/dev/null); then
    step profile 60 "$PYTHON" -m workbench.profile --model "$shape" --lora "$rank" --pairs "$pairs" --steps 3 \
        --dtype bfloat16 --no-trace --device "$DEVICE" --out "$OUT/profile"
fi
measure "$PART-lora-compiled" 90 "$PART" lora "$LARGE_STEPS" --compile
train small-default 60 "$(dirname "$0")/default.toml"
# Few pairs, many steps: whether all numbers stay finite, not how fast it is.
measure "$SMALL-full-many" 90 "$SMALL" full "$MANY_STEPS" --batch-size 2
measure "$LARGE-lora-many" 200 "$LARGE" lora "$MANY_STEPS" --batch-size 1
measure "$LARGE-full" 120 "$LARGE" full "$LARGE_STEPS"
measure "$SMALL-lora-kept" 60 "$SMALL" lora "$STEPS" --set train.checkpointing=false
measure "$LARGE-full-many" 200 "$LARGE" full "$MANY_STEPS" --batch-size 1
train small-arm 60 "$(dirname "$0")/claims.toml" --set timesteps.density=discounted \
    --set reward_scale.shape=inverse_sqrt_snr
# Last, since it takes minutes: kernels are made for the whole U-Net, of the policy and of the reference.
measure "$SMALL-full-compiled" 600 "$SMALL" full "$STEPS" --compile

summary
cat "$OUT/summary.md"
exit "$FAILED"
