#!/bin/sh
# curve.sh RUN DOMAIN SPARSITY: how many windows, and how many of them written by the model itself; three seeds.
set -eu
written=${WRITTEN:-written.jsonl}
[ -f "$written" ] || atp generate "$1" "$written" --rows "${ROWS:-96}" --tokens 192 --batch-size 48
python benchmarks/recovery/study.py "$1" benchmarks/recovery/results/curve.jsonl --domain "$2" --sparsity "$3" \
    --methods "${METHOD:-lr}" --no-keep-best --generated "$written" --windows "${SIZES:-8,16,32}" --shares 0.0,0.5,1.0 \
    --seeds 0,1,2 --held-out-windows 4 --test-windows 24 --other-windows 0
