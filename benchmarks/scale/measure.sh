#!/bin/sh
# Every engine in two processes on this machine's CPUs; nothing else should run. Needs `make test`'s environment, active.
set -eu
out=benchmarks/scale/results/cpu.jsonl
# Memory that is freed goes back to the system at once, so that the highest resident memory is what was in use.
export OMP_NUM_THREADS=1 PYTHONPATH=. DS_ACCELERATOR=cpu MALLOC_MMAP_THRESHOLD_=1048576
rm -f "$out"
for shape in "--rows 2 --length 256" "--rows 1 --length 512 --layers 12 --gradient-checkpointing"; do
    for engine in ddp fsdp2 zero2 zero3; do
        case $engine in zero*) on=ACCELERATE_TORCH_DEVICE=cpu ;; *) on=ACCELERATE_USE_CPU=true ;; esac
        env "$on" ATP_ENGINE=$engine accelerate launch --config_file configs/accelerate/$engine.yaml \
            benchmarks/scale/measure.py --cpu $shape --out "$out"
    done
done
