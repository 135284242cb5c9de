#!/usr/bin/env bash
# The quickstart's training, unchanged, in a pipeline of 2 stages x 2 slices of each layer x 2 data-parallel ranks.
# Beside it one process trains on the same batches; then plain transformers loads what the 8 have saved.
#
#   bash scripts/recipes/parallel/run.sh [OUT]      OUT: where results go, default out/parallel
#
# STEPS (default 20) is the length of both trainings. With fewer than 8 GPUs it trains on the CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
out="${1:-out/parallel}"
steps="${STEPS:-20}"
here=scripts/recipes/parallel quickstart=scripts/recipes/quickstart
blocks=32
started=$SECONDS

say() { printf '\n== %s  [%d s]\n' "$*" $((SECONDS - started)); }

[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" -lt 8 ]; then
    # In this form accelerate starts 8 processes on the CPU; `--cpu --num_processes 8` starts one, silently.
    export ACCELERATE_USE_CPU=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
mkdir -p "$out"

say "Tokenizer and dataset from the standard library"
[ -d "$out/data" ] || python "$quickstart/data.py" --out "$out/data"

train=(--data "$out/data" --hidden 128 --layers 4 --eval_blocks "$blocks" --max_steps "$steps"
    --per_device_eval_batch_size 8 --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_steps 5 --logging_steps 2
    --eval_strategy steps --eval_steps "$steps" --save_steps "$steps" --report_to none --seed 0 --disable_tqdm True
    --dataloader_pin_memory False)

say "1 process, batches of 16"
rm -rf "$out/one" "$out/spread"
python "$quickstart/train.py" --plain "${train[@]}" --per_device_train_batch_size 16 --output_dir "$out/one"

say "8 processes, 2 batches of 8: accelerate launch --num_processes 8"
accelerate launch --config_file "$here/accelerate.yaml" --num_processes 8 "$quickstart/train.py" "${train[@]}" \
    --hf_speed "$here/3d.yaml" --per_device_train_batch_size 8 --output_dir "$out/spread"

say "Losses side by side, and the model in plain transformers"
python "$here/compare.py" --data "$out/data" --one "$out/one" --spread "$out/spread" --eval_blocks "$blocks"

say "Done"
