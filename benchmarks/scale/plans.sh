#!/bin/sh
# Plans of large models: bfloat16, LoRA of rank 16, 4 rows of 2,048 tokens a GPU, gradient checkpointing, `width`.
set -eu
out=benchmarks/scale/results/plans.jsonl
row=$(mktemp)
rm -f "$out"
for plan in "llama-3-8b ddp 1" "llama-3-8b ddp 1 4" "llama-3-8b ddp 8" "llama-3-8b zero2 8" "llama-3-8b fsdp2 8" \
    "llama-3-8b zero3 8" "llama-3-70b fsdp2 8" "llama-3-70b zero3 8" "llama-3-70b fsdp2 16"; do
    set -- $plan
    atp plan --model "$1" --engine "$2" --gpus "$3" ${4:+--bits "$4"} --rows 4 --length 2048 --gradient-checkpointing \
        --json "$row" > /dev/null
    python -c 'import json, sys; print(json.dumps(json.load(open(sys.argv[1]))))' "$row" >> "$out"
done
rm -f "$row"
