#!/bin/sh
# curve.sh RUN DOMAIN SPARSITY: how many windows, and how many of them written by the model itself; three seeds.
set -eu
written=${WRITTEN:-benchmarks/recovery/results/written.jsonl}
[ -f "$written" ] || atp generate "$1" "$written" --rows "${ROWS:-64}" --tokens 256
study="python benchmarks/recovery/study.py $1 benchmarks/recovery/results/curve.jsonl --domain $2 --sparsity $3"
for seed in 0 1 2; do
    for windows in ${SIZES:-8 32}; do
        for share in 0.0 0.5 1.0; do
            $study --method "${METHOD:-lr}" --no-keep-best --windows "$windows" --share "$share" --seed "$seed" \
                --generated "$written"
        done
    done
done
