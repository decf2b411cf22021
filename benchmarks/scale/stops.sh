#!/bin/sh
# A run's two stops in one process and in two, a thread each; nothing else should run.
set -eu
out=benchmarks/scale/results/stops.jsonl
export OMP_NUM_THREADS=1 PYTHONPATH=. ACCELERATE_USE_CPU=true
rm -f "$out"
python benchmarks/scale/stops.py --cpu --out "$out"
accelerate launch --config_file configs/accelerate/ddp.yaml benchmarks/scale/stops.py --cpu --out "$out"
