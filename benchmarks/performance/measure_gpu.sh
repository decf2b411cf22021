#!/bin/sh
# The GPU rows of this folder, on one GPU of 80 GB or more; never run so far.
set -e
out="$(dirname "$0")/results"
mkdir -p "$out"
for space in width disp; do
    shapes="--config llama-3-8b --dtype bfloat16 --space $space"
    atp bench kernels $shapes --csv "$out/gpu_kernels_$space.csv"
    atp bench infer $shapes --compile --tokens 4096 --csv "$out/gpu_infer_$space.csv"
    atp bench train-step $shapes --gradient-checkpointing --rows 4 --length 2048 --calls 5 --csv "$out/gpu_train_step_$space.csv"
done
