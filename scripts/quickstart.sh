#!/usr/bin/env bash
# Trains a small Llama from scratch on the text of this machine's Python standard library: ZeRO-3 on 2 processes,
# saved, resumed on 2 and on 1, exported, reloaded with plain transformers. Sets up .venv first. Every number is
# measured here.
#
#   bash scripts/quickstart.sh [OUT]      OUT: where results go, default out/quickstart; an earlier one's are removed
#
# STEPS (default 400) is the length of the training; PYTHON another interpreter for .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${1:-out/quickstart}"
# A multiple of 20, so that saves, evaluations and log lines fall on the same steps before and after the resume.
steps=$(((${STEPS:-400} + 19) / 20 * 20))
resume_at=$((steps * 3 / 4))
recipe=scripts/recipes/quickstart
started=$SECONDS

say() { printf '\n== %s  [%d s]\n' "$*" $((SECONDS - started)); }

say "Setting up .venv"
bash scripts/setup_venv.sh recipes
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
if [ "$gpus" -ge 2 ]; then
    echo "training on 2 of $gpus GPUs"
else
    # accelerate starts two CPU processes only in this form: `--cpu --num_processes 2` starts one, silently.
    export ACCELERATE_USE_CPU=1 CUDA_VISIBLE_DEVICES=
    cores="$(nproc)"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 1 ? cores / 2 : 1))}"
    echo "training on the CPU: sharding needs 2 devices, and this machine has $gpus GPU(s)"
fi
launch=(accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no
    --main_process_port 0)

if [ -e "$out" ] && [ ! -e "$out/.quickstart" ] && [ -n "$(ls -A "$out")" ]; then
    echo "quickstart: $out holds files that are not from a quickstart; name another folder or remove it." >&2
    exit 1
fi
rm -rf "$out"
mkdir -p "$out"
touch "$out/.quickstart"

say "Tokenizer and dataset from the standard library"
python "$recipe/data.py" --out "$out/data"

train=(--data "$out/data" --max_steps "$steps" --per_device_train_batch_size 4 --per_device_eval_batch_size 8
    --learning_rate 2e-3 --lr_scheduler_type cosine --warmup_steps 20 --weight_decay 0.1 --adam_beta2 0.98 --optim adamw_torch_fused
    --logging_steps $((steps / 20)) --eval_strategy steps --eval_steps $((steps / 4))
    --save_steps $((steps / 4)) --report_to none --seed 0 --disable_tqdm False --dataloader_pin_memory False)

say "Plain PyTorch, one process, 3 steps: how many bytes it keeps alive"
python "$recipe/train.py" --plain "${train[@]}" --max_steps 3 --eval_strategy no --save_strategy no \
    --output_dir "$out/plain" --bytes_json "$out/bytes_plain.json"

say "Training: ZeRO-3 on 2 processes, $steps steps"
"${launch[@]}" "$recipe/train.py" "${train[@]}" --hf_speed "$recipe/zero3.yaml" \
    --output_dir "$out/run" --bytes_json "$out/bytes_zero3.json"

say "Resuming from checkpoint-$resume_at, in new processes"
"${launch[@]}" "$recipe/train.py" "${train[@]}" --hf_speed "$recipe/zero3.yaml" \
    --output_dir "$out/resumed" --resume_from_checkpoint "$out/run/checkpoint-$resume_at"

say "Resuming from checkpoint-$resume_at on 1 process, with twice its batch"
# One GPU, where there are several: the Trainer of a single process would use them all.
if [ "$gpus" -ge 2 ]; then
    alone=(env CUDA_VISIBLE_DEVICES=0)
else
    alone=(env OMP_NUM_THREADS="$((OMP_NUM_THREADS * 2))")
fi
"${alone[@]}" python "$recipe/train.py" "${train[@]}" --per_device_train_batch_size 8 --per_device_eval_batch_size 16 \
    --hf_speed "$recipe/zero3.yaml" --output_dir "$out/resumed_on_1" \
    --resume_from_checkpoint "$out/run/checkpoint-$resume_at"

say "What was measured"
python "$recipe/report.py" --out "$out" --resumed-at "$resume_at"

say "Exporting a plain Hub model"
python -c 'import sys, hf_speed; hf_speed.export(sys.argv[1], sys.argv[2])' "$out/run/checkpoint-$steps" "$out/export"
ls -l "$out/export"

say "Generating with plain transformers, in a new process without hf_speed"
python "$recipe/generate.py" "$out/export"

say "Done"
