#!/bin/sh
# study.sh RUN DOMAIN SPARSITY [STUDENT]: every method on one run, the same windows and passes; then plain LoRA for as many tokens.
set -eu
study="python benchmarks/recovery/study.py $1 benchmarks/recovery/results/methods.jsonl --domain $2 --sparsity $3"
student=${4:-one-stage run}
size="--windows ${WINDOWS:-40} --epochs ${EPOCHS:-2} --batch-size ${BATCH:-1}"
measured="--held-out-windows 16 --test-windows 32 --other-windows 4"
$study $size $measured --student "$student" --methods "${METHODS:-lr,br,br+gp,br+gp+cr,lora}" --no-keep-best
$study $size $measured --student "$student" --methods br+gp+cr
