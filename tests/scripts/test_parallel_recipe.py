"""What the 3D recipe compares, and when it calls runs different."""

from pathlib import Path

import compare
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from hf_speed.config import check_world, load_config

RECIPE = Path(__file__).resolve().parents[2] / "scripts" / "recipes" / "parallel"


def test_losses_agree_where_they_are_the_same_sums() -> None:
    one = {2: 7.0, 4: 6.0}
    text, agree = compare.table(one, {2: 7.0, 4: 6.0000001})
    assert agree
    assert text.count("\n") == 2
    assert not compare.table(one, {2: 7.0, 4: 6.01})[1]
    assert not compare.table(one, {2: 7.0})[1]
    assert not compare.table({}, {})[1]


def test_the_evaluation_is_the_mean_over_all_blocks() -> None:
    torch.manual_seed(0)
    shapes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_attention_heads=2, **shapes))
    blocks = torch.randint(0, 32, (16, 6))
    whole = float(model(input_ids=blocks, labels=blocks).loss.detach())
    assert abs(compare.evaluate(model, blocks) - whole) < 1e-6


def test_its_mesh_is_the_world_that_accelerate_starts() -> None:
    accelerate = yaml.safe_load((RECIPE / "accelerate.yaml").read_text())
    sizes = check_world(load_config(RECIPE / "3d.yaml"), accelerate["num_processes"])
    assert (sizes.pp, sizes.tp, sizes.dp_shard) == (2, 2, 2)
