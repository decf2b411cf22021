#!/bin/sh
# The GPU rows of this folder, on one GPU of 140 GB: all of them, or those of the parts that are named (kernels, train-step,
# prefill, decode), into $OUT or results/. Never run so far.
set -e
out="${OUT:-$(dirname "$0")/results}"
mkdir -p "$out"
for part in ${*:-kernels train-step prefill decode}; do
    for space in width disp; do
        shapes="--config llama-3-8b --dtype bfloat16 --space $space"
        case "$part" in
        kernels) python3 -m atp bench kernels $shapes --csv "$out/gpu_kernels_$space.csv" ;;
        train-step) python3 -m atp bench train-step $shapes --rows 4 --length 2048 --calls 5 --csv "$out/gpu_train_step_$space.csv" ;;
        prefill) python3 -m atp bench infer $shapes --tokens 4096 --csv "$out/gpu_prefill_$space.csv" ;;
        decode) python3 -m atp bench infer $shapes --compile --csv "$out/gpu_decode_$space.csv" ;;
        *) echo "no such part: $part" >&2 && exit 2 ;;
        esac
    done
done
