"""What a sliced model sends, draws, recomputes and gives back."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_speed.mesh import AxisGroup
from hf_speed.mesh.journal import Journal
from hf_speed.nn.deferred import Queue
from tests.engine.toys import global_batch, toy_model
from tests.nn.sliced.worlds import (
    Result,
    assert_close,
    joined,
    lively,
    sliced,
    sliced_step,
    whole_step,
    world,
)
from tests.support import run_ranks

NUM_LAYERS = 3
LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_layers": NUM_LAYERS}


class CountingJournal(Journal):
    """Counts collectives by what is going on when they start."""

    def __init__(self) -> None:
        super().__init__(enabled=False)
        self.phase = ""
        self.notes: Counter[tuple[str, str]] = Counter()

    def note(
        self, operation: str, group: AxisGroup, *, num_bytes: int, sent: int
    ) -> Callable[[], None]:
        """Count, then do as ever."""
        self.notes[self.phase, operation] += 1
        return super().note(operation, group, num_bytes=num_bytes, sent=sent)

    def follow(self, module: nn.Module, name: str) -> None:
        """Name the phases of a module: its forward, and its backward until the one before it."""
        module.register_forward_pre_hook(lambda *_: self._enter(f"{name} forward"))
        module.register_forward_hook(lambda *_: self._enter(""))
        module.register_full_backward_pre_hook(lambda *_: self._enter(f"{name} backward"))

    def _enter(self, phase: str) -> None:
        self.phase = phase


def _counts(options: dict[str, Any]) -> Counter[tuple[str, str]]:
    place = world()._replace(journal=CountingJournal())
    model: Any = toy_model("llama", **LLAMA).train()
    sliced(model, place, **options)
    for module, name in (
        (model.model.embed_tokens, "embedding"),
        *((layer, f"block {index}") for index, layer in enumerate(model.model.layers)),
        (model.model.norm, "norm"),
        (model.lm_head, "head"),
    ):
        place.journal.follow(module, name)
    loss = model(**global_batch("llama", 0)).loss
    place.journal.phase = "loss backward"
    loss.backward()
    return place.journal.notes


def test_a_block_takes_two_all_reduces_each_way_as_megatrons() -> None:
    """On a CPU each is a reduce-scatter and an all-gather."""
    for notes in run_ranks(_counts, 2, {}):
        blocks = [f"block {index}" for index in range(NUM_LAYERS)]
        both = ("reduce_scatter", "all_gather")
        expected = {
            (f"{block} {way}", operation): 2
            for block in blocks
            for way in ("forward", "backward")
            for operation in both
        }
        expected |= {("embedding forward", operation): 1 for operation in both}
        expected |= {("head backward", operation): 1 for operation in both}
        # Three numbers of each token and rank.
        expected["", "all_gather"] = 1
        assert notes == expected


def test_with_rows_divided_a_block_sends_the_same() -> None:
    for notes in run_ranks(_counts, 2, {"sequence_parallel": True}):
        for index in range(NUM_LAYERS):
            assert notes[f"block {index} forward", "all_gather"] == 2 + (index == NUM_LAYERS - 1)
            assert notes[f"block {index} forward", "reduce_scatter"] == 2
            assert notes[f"block {index} backward", "reduce_scatter"] == 2
            assert notes[f"block {index} backward", "all_gather"] == 2 + (index == 0)
        # Beside them one all-gather each where the hidden states are divided and put together.
        sums = sum(count for (_, name), count in notes.items() if name == "reduce_scatter")
        assert sums == 2 * 2 * NUM_LAYERS + 2


class _Seen:
    """What dropout does in one pass: which elements it drops, where, by order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.masks: list[Tensor] = []
        dropout = nn.functional.dropout

        def watched(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:  # noqa: FBT001, FBT002
            y = dropout(x, p, training, inplace)
            if training and p > 0:
                self.masks.append((dropout(torch.ones_like(x), 0.0) * (y == 0)).detach())
            return y

        monkeypatch.setattr(nn.functional, "dropout", watched)


DROPOUT = {
    "gpt2": {"n_head": 4, "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "bert": {
        "num_attention_heads": 4,
        "hidden_dropout_prob": 0.5,
        "attention_probs_dropout_prob": 0.5,
    },
    "llama": {"num_attention_heads": 4, "attention_dropout": 0.5},
}
EAGER = {"attn_implementation": "eager"}


def _dropout(kind: str) -> tuple[list[Tensor], Tensor, Tensor]:
    place = world()
    model = lively(toy_model(kind, **DROPOUT[kind], **EAGER))
    sliced(model, place)
    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = _Seen(monkeypatch)
        loss = model(**global_batch(kind, 0)).loss
    return seen.masks, loss.detach(), torch.rand(4)


@pytest.mark.parametrize("kind", DROPOUT)
def test_dropout_inside_regions_differs_by_rank_and_outside_agrees(kind: str) -> None:
    (left, loss, after), (right, other_loss, other_after) = run_ranks(_dropout, 2, kind)
    assert len(left) == len(right) > 0
    num_inside = 0
    for mine, theirs in zip(left, right, strict=True):
        # Attention's weights have four dims, hidden states three.
        inside = mine.dim() == 4
        num_inside += inside
        assert torch.equal(mine, theirs) != inside
    assert num_inside == 2
    assert torch.equal(loss, other_loss)
    # Every rank goes on with the same numbers.
    assert torch.equal(after, other_after)


def _drawn_rows() -> tuple[list[Tensor], Tensor]:
    place = world()
    model = lively(toy_model("gpt2", **DROPOUT["gpt2"], **EAGER))
    sliced(model, place, sequence_parallel=True)
    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = _Seen(monkeypatch)
        model(**global_batch("gpt2", 0))
    return seen.masks, torch.rand(4)


def test_with_rows_divided_dropout_of_each_ranks_rows_is_its_own() -> None:
    (left, after), (right, other_after) = run_ranks(_drawn_rows, 2)
    # The first acts on the embeddings, which are whole.
    assert torch.equal(left[0], right[0])
    for mine, theirs in zip(left[1:], right[1:], strict=True):
        assert not torch.equal(mine, theirs)
    assert torch.equal(after, other_after)


def _failing() -> list[Tensor]:
    place = world()
    model: Any = lively(toy_model("gpt2", **DROPOUT["gpt2"], **EAGER))
    sliced(model, place)
    torch.manual_seed(3)
    handle = model.transformer.h[1].attn.attn_dropout.register_forward_hook(lambda *_: 1 / 0)
    original = nn.functional.dropout
    # In the middle of a region.
    softmax = nn.functional.softmax

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        if place.journal.bytes_sent["reduce_scatter"] > 0:
            raise ZeroDivisionError
        return softmax(*args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(nn.functional, "softmax", failing)
        with pytest.raises(ZeroDivisionError):
            model(**global_batch("gpt2", 0))
    handle.remove()
    assert nn.functional.dropout is original
    first = torch.rand(4)
    model(**global_batch("gpt2", 0)).loss.backward()
    return [first, torch.rand(4)]


def test_a_pass_that_fails_inside_a_region_leaves_the_ranks_in_step() -> None:
    left, right = run_ranks(_failing, 2)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(left, right, strict=True))


def _checkpointed(kind: str, use_reentrant: bool, sequence_parallel: bool) -> None:  # noqa: FBT001
    place = world()
    results = []
    for checkpointing in (False, True):
        model: Any = lively(toy_model(kind, **DROPOUT.get(kind, LLAMA)))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        done = sliced(model, place, sequence_parallel=sequence_parallel)
        torch.manual_seed(5)
        batch = {**global_batch(kind, 0), "use_cache": False} if kind != "bert" else None
        results.append(sliced_step(model, done, place, batch or global_batch(kind, 0)))
    plain, recomputed = results
    assert torch.equal(plain.loss, recomputed.loss)
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(
            recomputed.gradients[name], gradient, rtol=1e-6, atol=1e-7, msg=name
        )


def _every_checkpointing() -> None:
    for kind in ("gpt2", "bert", "llama"):
        for use_reentrant in (False, True):
            for sequence_parallel in (False, True):
                _checkpointed(kind, use_reentrant, sequence_parallel)


def test_recomputed_blocks_draw_and_send_what_they_did() -> None:
    run_ranks(_every_checkpointing, 2)


def _deferred() -> None:
    place = world()
    batch = global_batch("llama", 0)
    for sequence_parallel in (False, True):
        theirs = whole_step(lively(toy_model("llama", **LLAMA)), batch)
        model = lively(toy_model("llama", **LLAMA))
        done = sliced(model, place, sequence_parallel=sequence_parallel)
        queue = Queue()
        done.defer_to(queue)
        loss = model(**batch).loss
        loss.backward()
        # Seven linears a block, and the head.
        assert len(queue) == 7 * NUM_LAYERS + 1
        assert model.get_submodule("model.layers.0.self_attn.q_proj").weight.grad is None
        queue.drain()
        gradients = joined(model, done, place, lambda parameter: parameter.grad)
        assert_close(Result(loss.detach(), gradients), theirs)
        done.defer_to(None)
        model.zero_grad()
        assert_close(sliced_step(model, done, place, batch), theirs)


def test_weight_gradients_can_go_to_a_queue_of_a_schedule() -> None:
    run_ranks(_deferred, 2)


def _twice(options: dict[str, Any]) -> None:
    """Two passes of different lengths before their backwards, and one backward over both."""
    place = world()
    model = lively(toy_model("llama", **LLAMA))
    whole = lively(toy_model("llama", **LLAMA))
    done = sliced(model, place, **options)
    batches = [global_batch("llama", step) for step in range(2)]
    batches[1] = {name: value[:1, 1:] for name, value in batches[1].items()}
    for each in (whole, model):
        if options:
            each.gradient_checkpointing_enable({"use_reentrant": False})
        losses = [each(**batch).loss for batch in batches]
        losses[0].backward()
        (2 * losses[1]).backward()
        sum(each(**batch).loss for batch in batches).backward()
    gradients = joined(model, done, place, lambda parameter: parameter.grad)
    theirs = {name: each.grad for name, each in whole.named_parameters()}
    assert_close(Result(torch.zeros(()), gradients), Result(torch.zeros(()), theirs))


@pytest.mark.parametrize("options", [{}, {"sequence_parallel": True}], ids=str)
def test_passes_may_overlap_and_accumulate(options: dict[str, Any]) -> None:
    run_ranks(_twice, 2, options)


def _mixed() -> None:
    place = world()
    for kind, overrides in (("llama", LLAMA), ("gpt2", {"n_head": 4})):
        whole, model = (lively(toy_model(kind, **overrides)) for _ in range(2))
        done = sliced(model, place)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs = whole_step(whole, global_batch(kind, 0))
            ours = sliced_step(model, done, place, global_batch(kind, 0))
        # bf16 has 8 bits.
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-2, atol=0.0)
        for name, gradient in ours.gradients.items():
            assert gradient.dtype == torch.float32
            largest = theirs.gradients[name].abs().max()
            torch.testing.assert_close(
                gradient, theirs.gradients[name], rtol=0.0, atol=float(0.1 * largest) + 1e-3
            )


def test_under_autocast_slices_compute_in_its_dtype_and_gradients_in_the_weights() -> None:
    run_ranks(_mixed, 2)
