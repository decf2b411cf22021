#!/bin/sh
# The CPU rows of this folder, half an hour on two cores.
set -e
out="$(dirname "$0")/results"
mkdir -p "$out"
for space in width disp; do
    atp bench train-step --space "$space" --calls 5 --csv "$out/cpu_train_step_$space.csv"
done
for space in width disp depth hidden; do
    atp bench infer --space "$space" --csv "$out/cpu_infer_$space.csv"
    atp bench infer --space "$space" --tokens 128 --csv "$out/cpu_infer_128_$space.csv"
done
atp bench export --config llama-3-8b --layers 8 --dtype bfloat16 --calls 3 --csv "$out/cpu_export_width.csv"
atp bench run --sparsity 0.4 --freeze-at 0.5 --calls 3 --csv "$out/cpu_run_width.csv"
