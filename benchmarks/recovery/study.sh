#!/bin/sh
# study.sh RUN DOMAIN SPARSITY: every method on one run, the same windows and passes; then plain LoRA for as many tokens.
set -eu
study="python benchmarks/recovery/study.py $1 benchmarks/recovery/results/methods.jsonl --domain $2 --sparsity $3"
size="--windows ${WINDOWS:-48} --epochs ${EPOCHS:-5}"
for method in lr br br+gp br+gp+cr; do
    $study $size --method $method --no-keep-best
done
$study $size --method br+gp
$study $size --method lora
