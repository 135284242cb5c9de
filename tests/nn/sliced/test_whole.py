"""What a sliced model is to its user: evaluated, generating, copied, put together again."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from hf_speed.errors import EngineError
from tests.engine.toys import VOCAB, global_batch, plain_parameters, toy_model
from tests.nn.sliced.worlds import (
    lively,
    sliced,
    sliced_step,
    whole_step,
    whole_values,
    world,
)
from tests.support import run_ranks

NUM_LAYERS = 3
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_layers": NUM_LAYERS}


def _undone() -> None:
    place = world()
    for kind in ("llama", "gpt2", "bert"):
        for sequence_parallel in (False, True):
            overrides = {"num_attention_heads": 4} if kind != "gpt2" else {"n_head": 4}
            model = lively(toy_model(kind, **overrides))
            before = plain_parameters(model)
            attributes = {name: dict(vars(each)) for name, each in model.named_modules()}
            classes = {name: type(each) for name, each in model.named_modules()}
            batch = global_batch(kind, 0)
            expected = whole_step(model, batch)
            model.zero_grad()
            done = sliced(model, place, sequence_parallel=sequence_parallel)
            assert any(type(each) is not classes[name] for name, each in model.named_modules())
            sliced_step(model, done, place, batch)
            values = whole_values(model, done, place)
            done.undo(lambda name, values=values: values[name])
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, before[name])
            assert classes == {name: type(each) for name, each in model.named_modules()}
            for name, module in model.named_modules():
                assert _plain(vars(module)) == _plain(attributes[name]), name
            model.zero_grad()
            again = whole_step(model, batch)
            assert torch.equal(again.loss, expected.loss)
            for name, gradient in again.gradients.items():
                assert torch.equal(gradient, expected.gradients[name])


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    kept = (int, float, str, bool, type(None))
    return {name: value for name, value in attributes.items() if isinstance(value, kept)}


def test_undo_gives_back_bitwise_the_model_that_was() -> None:
    run_ranks(_undone, 2)


def _evaluated() -> list[Tensor]:
    place = world()
    tokens = global_batch("llama", 0)["input_ids"]
    found = []
    for sequence_parallel in (False, True):
        whole: Any = lively(toy_model("llama", **LLAMA)).eval()
        model: Any = lively(toy_model("llama", **LLAMA)).eval()
        sliced(model, place, sequence_parallel=sequence_parallel)
        with torch.no_grad():
            theirs, ours = whole(tokens, labels=tokens), model(tokens, labels=tokens)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        expected = whole.generate(tokens, **options)
        assert torch.equal(model.generate(tokens, **options), expected)
        torch.manual_seed(1)
        found.append(model.generate(tokens, **{**options, "do_sample": True}))
        # In training, without labels: whole too, with gradients.
        model.train()
        logits = model(tokens).logits
        assert logits.shape == (*tokens.shape, VOCAB)
        logits.square().sum().backward()
        assert model.lm_head.weight.grad.shape == model.lm_head.weight.shape
    return found


def test_without_a_training_loss_logits_are_whole_and_generation_is_the_whole_models() -> None:
    for left, right in zip(*run_ranks(_evaluated, 2), strict=True):
        assert torch.equal(left, right)


def _read() -> None:
    place = world()
    model: Any = toy_model("llama", **LLAMA).train()
    done = sliced(model, place)
    tokens = global_batch("llama", 0)["input_ids"]
    output = model(input_ids=tokens, labels=tokens)
    assert output.logits.shape == (*tokens.shape, VOCAB)
    assert not output.logits.requires_grad
    assert output.logits.float().detach().shape == output.logits.shape
    with pytest.raises(EngineError, match="reads the logits of a training step"):
        output.logits.argmax(-1)
    _, logits, *_ = model(input_ids=tokens, labels=tokens, return_dict=False)
    with pytest.raises(EngineError, match="Call the model without labels, or in eval mode"):
        logits.sum()
    # Labels by place, as the signature has them.
    output = model(tokens, None, None, None, None, tokens)
    assert "SlicedLogits" in repr(output.logits)
    output.loss.backward()
    model.zero_grad()
    # A loss of the user's own sees whole logits.
    values = whole_values(model, done, place)
    done.undo(lambda name: values[name])
    model.loss_function = lambda logits, labels, **_: logits.sum() + 0 * labels.sum()
    sliced(model, place)
    output = model(input_ids=tokens, labels=tokens)
    assert torch.equal(output.loss, output.logits.sum())


def test_logits_of_a_training_step_are_a_stand_in_that_says_so() -> None:
    run_ranks(_read, 2)


def _divided_hidden_states() -> None:
    place = world()
    model: Any = toy_model("llama", **LLAMA).train()
    sliced(model, place, sequence_parallel=True)
    shapes = []
    model.model.layers[1].register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    tokens = torch.ones(3, 5, dtype=torch.long)
    model(tokens)
    # 15 tokens on 2 ranks: 8 rows, of which one is padding.
    assert shapes == [(1, 8, 16)]
    with pytest.raises(
        EngineError, match="output_hidden_states=True would return this rank's rows"
    ):
        model(tokens, output_hidden_states=True)
    with pytest.raises(EngineError, match=r"are not one of 2 ranks' rows of a batch that"):
        model.model.layers[1](torch.zeros(3, 5, 16))
    with pytest.raises(EngineError, match="was called without hidden states"):
        model.model.layers[0]()


def test_hidden_states_between_regions_are_this_ranks_rows() -> None:
    run_ranks(_divided_hidden_states, 2)


def _on_meta() -> None:
    place = world()
    with torch.device("meta"):
        empty = toy_model("llama", **LLAMA)
    full = toy_model("llama", **LLAMA)
    left, right = sliced(empty, place), sliced(full, place)
    assert left.slicings == right.slicings
    assert left.partial == right.partial
    for mine, theirs in zip(empty.parameters(), full.parameters(), strict=True):
        assert mine.is_meta
        assert mine.shape == theirs.shape
        assert theirs.is_contiguous()


def test_a_model_on_meta_is_sliced_alike() -> None:
    run_ranks(_on_meta, 2)


def _frozen() -> None:
    """Only the norms and one projection learn: no gradient is computed or sent for the rest."""
    place = world()
    results = []
    for slice_it in (False, True):
        model: Any = lively(toy_model("llama", **LLAMA)).requires_grad_(requires_grad=False)
        model.model.layers[1].self_attn.o_proj.weight.requires_grad_()
        model.model.layers[2].mlp.up_proj.weight.requires_grad_()
        done = sliced(model, place) if slice_it else None
        model(**global_batch("llama", 0)).loss.backward()
        found = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                slicing = done.slicings[name] if done is not None else None
                if slicing is None:
                    found[name] = parameter.grad
                else:
                    parts: list[Any] = [None] * place.tp.size
                    dist.all_gather_object(parts, parameter.grad)
                    found[name] = slicing.join(parts)
        results.append(found)
    whole, joined_ = results
    assert len(whole) == 2
    assert whole.keys() == joined_.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(joined_[name], gradient, rtol=1e-5, atol=1e-6)


def test_frozen_weights_get_no_gradient_and_the_others_theirs() -> None:
    run_ranks(_frozen, 2)


def _copied() -> None:
    """Phi-3 reads its head counts in the config; GPT-2's linears are Conv1D."""
    place = world()
    phi: Any = transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**SMALL, pad_token_id=0, eos_token_id=2)
    )
    for model in (phi, toy_model("gpt2", n_head=4)):
        sliced(model.train(), place)
        other = copy.deepcopy(model)
        tokens = global_batch("llama", 0)["input_ids"]
        losses = [each(input_ids=tokens, labels=tokens).loss for each in (model, other)]
        assert torch.equal(*losses)
        losses[1].backward()
        assert all(each.grad is None for each in model.parameters())
        assert all(each.grad is not None for each in other.parameters())


def test_a_copy_of_a_sliced_model_is_one_too() -> None:
    run_ranks(_copied, 2)
