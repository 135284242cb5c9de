"""Keys that users bring from elsewhere, and where they belong: names only, no code.

TrainingArguments (in a plain loop, Accelerator or the loop itself) owns batch sizes, learning rate,
precision, clipping and accumulation. Said in two places, one of the two would be ignored; so here
they are refused, naming the owner.
"""

from collections.abc import Mapping
from types import MappingProxyType

_BATCH = "TrainingArguments(per_device_train_batch_size=)"
_EVAL_BATCH = "TrainingArguments(per_device_eval_batch_size=)"
_ACCUMULATION = (
    "TrainingArguments(gradient_accumulation_steps=) or Accelerator(gradient_accumulation_steps=)"
)
_RATE = "TrainingArguments(learning_rate=) or the optimizer of your loop"
_DECAY = "TrainingArguments(weight_decay=) or the optimizer of your loop"
_BF16 = "TrainingArguments(bf16=) or Accelerator(mixed_precision='bf16')"
_FP16 = "TrainingArguments(fp16=) or Accelerator(mixed_precision='fp16')"
_CLIP = "TrainingArguments(max_grad_norm=) or accelerator.clip_grad_norm_(max_norm=)"
_OPTIMIZER = "TrainingArguments(optim=, optim_args=) or the optimizer of your loop"
_SCHEDULE = (
    "TrainingArguments(lr_scheduler_type=, lr_scheduler_kwargs=) or the scheduler of your loop"
)
_WARMUP = "TrainingArguments(warmup_steps=) or the scheduler of your loop"
_RECOMPUTE = "TrainingArguments(gradient_checkpointing=, gradient_checkpointing_kwargs=)"

OWNED_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "batch_size": _BATCH,
        "micro_batch_size": _BATCH,
        "per_device_train_batch_size": _BATCH,
        "train_batch_size": _BATCH,
        "train_micro_batch_size_per_gpu": _BATCH,
        "eval_batch_size": _EVAL_BATCH,
        "per_device_eval_batch_size": _EVAL_BATCH,
        "accumulation_steps": _ACCUMULATION,
        "gradient_accumulation": _ACCUMULATION,
        "gradient_accumulation_steps": _ACCUMULATION,
        "learning_rate": _RATE,
        "lr": _RATE,
        "weight_decay": _DECAY,
        "bf16": _BF16,
        "bfloat16": _BF16,
        "fp16": _FP16,
        "float16": _FP16,
        "mixed_precision": "TrainingArguments(bf16=) or (fp16=), or Accelerator(mixed_precision=)",
        "clip_grad_norm": _CLIP,
        "gradient_clipping": _CLIP,
        "max_grad_norm": _CLIP,
        "optim": _OPTIMIZER,
        "optim_args": _OPTIMIZER,
        "optimizer": _OPTIMIZER,
        "adam_beta1": "TrainingArguments(adam_beta1=) or the optimizer of your loop",
        "adam_beta2": "TrainingArguments(adam_beta2=) or the optimizer of your loop",
        "adam_epsilon": "TrainingArguments(adam_epsilon=) or the optimizer of your loop",
        "betas": _OPTIMIZER,
        "eps": _OPTIMIZER,
        "lr_scheduler": _SCHEDULE,
        "lr_scheduler_type": _SCHEDULE,
        "scheduler": _SCHEDULE,
        "warmup": _WARMUP,
        "warmup_ratio": _WARMUP,
        "warmup_steps": _WARMUP,
        "max_steps": "TrainingArguments(max_steps=) or your loop",
        "num_train_epochs": "TrainingArguments(num_train_epochs=) or your loop",
        "seed": "TrainingArguments(seed=) or accelerate.utils.set_seed",
        "logging_steps": "TrainingArguments(logging_steps=)",
        "steps_per_print": "TrainingArguments(logging_steps=)",
        "save_steps": "TrainingArguments(save_steps=)",
        "save_total_limit": "TrainingArguments(save_total_limit=)",
        "output_dir": "TrainingArguments(output_dir=)",
        "activation_checkpointing": _RECOMPUTE,
        "gradient_checkpointing": _RECOMPUTE,
        "torch_compile": "TrainingArguments(torch_compile=)",
        "tensorboard": "TrainingArguments(report_to='tensorboard')",
        "wandb": "TrainingArguments(report_to='wandb')",
        "num_processes": "the launcher (`hf-speed launch -n N`)",
        "world_size": "the launcher (`hf-speed launch -n N`)",
    }
)
"""Key to the argument that owns it."""

_ALWAYS = "Remove it: hf_speed always does this."
_PER_UNIT = "Remove it: hf_speed moves whole units; zero.units sets them."
_SLICES = "Write mesh.tp, the number of ranks that divide each layer."
_STAGES = "Write mesh.pp, the number of pipeline ranks."

DEEPSPEED_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "zero_optimization": "Write zero.stage.",
        "communication_data_type": "Write precision.reduce_dtype.",
        "data_types": "Write precision.accumulate_dtype.",
        "grad_accum_dtype": "Write precision.accumulate_dtype.",
        "initial_scale_power": "Write precision.loss_scale.initial, the power of two itself.",
        "loss_scale_window": "Write precision.loss_scale.window.",
        "min_loss_scale": "Write precision.loss_scale.floor.",
        "stage3_prefetch_bucket_size": "Write zero.prefetch_units, a number of units.",
        "zero_hpz_partition_size": "Write mesh.dp_shard.",
        "mics_shard_size": "Write mesh.dp_shard.",
        "overlap_comm": _ALWAYS,
        "contiguous_gradients": _ALWAYS,
        "reduce_scatter": _ALWAYS,
        "allgather_partitions": _ALWAYS,
        "reduce_bucket_size": _PER_UNIT,
        "allgather_bucket_size": _PER_UNIT,
        "stage3_param_persistence_threshold": _PER_UNIT,
        "stage3_max_live_parameters": "Write zero.prefetch_units, which bounds the units alive.",
        "stage3_max_reuse_distance": "Write zero.regather.",
        "stage3_gather_16bit_weights_on_model_save": _ALWAYS,
        "offload_optimizer": "Write offload.optimizer: host or disk.",
        "offload_param": "Write offload.parameters: host or disk.",
        "cpu_offload": "Write offload.optimizer=host.",
        "cpu_offload_params": "Write offload.parameters=host.",
        "cpu_checkpointing": "Write offload.activations=host.",
        "nvme_path": "Write offload.paths, a list of directories.",
        "buffer_count": "Write offload.staging_bytes, which holds for all buffers.",
        "buffer_size": "Write offload.staging_bytes, which holds for all buffers.",
        "max_in_cpu": "Write offload.host_bytes.",
        "sub_group_size": "Remove it: hf_speed updates chunk by chunk in offload.staging_bytes.",
        "pin_memory": _ALWAYS,
        "fast_init": _ALWAYS,
        "pipeline_read": _ALWAYS,
        "pipeline_write": _ALWAYS,
        "aio": "Remove it: hf_speed finds the fastest way to each disk itself.",
        "tensor_parallel": _SLICES,
        "autotp_size": _SLICES,
        "tp_size": _SLICES,
        "tp_overlap_comm": _ALWAYS,
        "keep_module_on_host": "Remove it: hf_speed cuts each layer where it is.",
        "pipeline": "Write mesh.pp, and the section pipe.",
        "num_stages": _STAGES,
        "stages": _STAGES,
        "partition_method": "Write pipe.balance.",
        "pipe_partitioned": "Remove it: hf_speed sends hidden states whole.",
        "grad_partitioned": "Remove it: hf_speed sends hidden states whole.",
        "sequence_parallel_size": "Remove it: attention over pieces of a sequence is not here. "
        "tensor.sequence_parallel divides the activations between the layers over mesh.tp.",
        "wall_clock_breakdown": "Write debug.stats.",
        "comms_logger": "Write debug.journal.",
    }
)
"""DeepSpeed's key to what to do about it."""
