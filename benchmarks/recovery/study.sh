#!/bin/sh
# study.sh RUN DOMAIN SPARSITY: every method on one run, the same windows and passes; then plain LoRA for as many tokens.
set -eu
study="python benchmarks/recovery/study.py $1 benchmarks/recovery/results/methods.jsonl --domain $2 --sparsity $3"
size="--windows ${WINDOWS:-32} --epochs ${EPOCHS:-5} --held-out-windows 24 --test-windows 48 --other-windows 8"
$study $size --methods lr,br,br+gp,br+gp+cr --no-keep-best
$study $size --methods br+gp,lora
