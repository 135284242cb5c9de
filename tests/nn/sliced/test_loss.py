"""Cross entropy from slices of logits against transformers' and an fp64 oracle."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from hf_speed.errors import EngineError
from hf_speed.mesh.axes import IDENTITY
from hf_speed.mesh.journal import Journal
from hf_speed.nn.sliced import loss as loss_file
from hf_speed.nn.sliced.deal import deal
from hf_speed.nn.sliced.exchange import Peers
from hf_speed.nn.sliced.layers import LogitsSwitch
from hf_speed.nn.sliced.loss import SlicedLoss, Words, sliced_cross_entropy
from tests.nn.sliced.worlds import World, world
from tests.support import run_ranks

FLOOR = 2.0**-22
"""Errors below a few units in the last place of fp32, of numbers around 1, are chance."""


def _words(place: World, total: int) -> Words:
    lengths = deal(total, place.tp.size)
    start = sum(lengths[: place.tp.rank])
    return Words(Peers(place.tp, place.journal), start, lengths[place.tp.rank], total)


def _tokens(
    total: int, num_tokens: int, *, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(total)
    logits = (scale * torch.randn(num_tokens, total, generator=generator)).to(dtype)
    targets = torch.randint(0, total, (num_tokens,), generator=generator)
    targets[::3] = -100
    return logits, targets


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).abs().max())


def _exact(place: World, *, scale: float, dtype: torch.dtype) -> None:
    total, num_tokens = 1001, 37
    logits, targets = _tokens(total, num_tokens, scale=scale, dtype=dtype)
    exact = logits.double().requires_grad_()
    oracle = nn.functional.cross_entropy(exact, targets, reduction="sum")
    oracle.backward()
    plain = logits.clone().requires_grad_()
    torchs = nn.functional.cross_entropy(plain.float(), targets, reduction="sum")
    torchs.backward()

    words = _words(place, total)
    mine = logits[:, words.start : words.start + words.count].clone().requires_grad_()
    ours = sliced_cross_entropy(mine, targets, words, ignore_index=-100)
    ours.backward()
    assert mine.grad is not None
    assert mine.grad.dtype == dtype
    part = slice(words.start, words.start + words.count)
    size = float(oracle.detach().abs())
    assert _error(ours.detach(), oracle.detach()) <= (
        2 * _error(torchs.detach(), oracle.detach()) + FLOOR * size
    )
    assert _error(mine.grad, exact.grad[:, part]) <= 2 * _error(plain.grad, exact.grad) + FLOOR
    # Padding rows and ignored tokens get none.
    assert not mine.grad[::3].any()


def _precise() -> list[Tensor]:
    place = world()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for scale in (1.0, 30.0, 1000.0):
            _exact(place, scale=scale, dtype=dtype)
    logits, targets = _tokens(61, 12, scale=3.0, dtype=torch.float32)
    words = _words(place, 61)
    part = logits[:, words.start : words.start + words.count]
    return [sliced_cross_entropy(part, targets, words, ignore_index=-100)]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_error_against_fp64_is_at_most_twice_torchs(num_ranks: int) -> None:
    first, *others = run_ranks(_precise, num_ranks)
    # The same bits on every rank.
    assert all(torch.equal(first[0], each[0]) for each in others)


def _like_transformers() -> None:
    place = world()
    total = 61
    words = _words(place, total)
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 7, total, generator=generator)
    labels = torch.randint(0, total, (2, 7), generator=generator)
    labels[0, :3] = -100
    part = logits[..., words.start : words.start + words.count]
    cases: list[dict[str, Any]] = [
        {},
        {"num_items_in_batch": 9},
        {"num_items_in_batch": torch.tensor(9)},
        {"ignore_index": 5},
        {"shift_labels": labels.roll(2, 1)},
    ]
    switch = LogitsSwitch()
    all_labels = labels
    for kind, theirs in (("causal", ForCausalLMLoss), ("masked", ForMaskedLMLoss)):
        ours = SlicedLoss(kind, words, switch, theirs)
        for case in cases:
            ignored = case.get("ignore_index", -100)
            labels = all_labels.masked_fill(all_labels == -100, ignored)
            if kind == "masked" and "shift_labels" in case:
                continue
            expected = theirs(logits, labels, total, **case)
            switch.local = True
            torch.testing.assert_close(
                ours(part, labels, total, **case), expected, rtol=1e-5, atol=0.0
            )
            # As other models call it, with arguments that the loss has no use for.
            torch.testing.assert_close(
                ours(logits=part, labels=labels, vocab_size=total, extra=1, **case),
                expected,
                rtol=1e-5,
                atol=0.0,
            )
            switch.local = False
            assert torch.equal(ours(logits, labels, total, **case), expected)
    labels = all_labels
    switch.local = True
    with pytest.raises(EngineError, match=r"got logits of 61 words, but this rank's head gives"):
        ours(logits, labels, total)
    with pytest.raises(RuntimeError, match="a label is not in the vocabulary"):
        ours(part, labels.masked_fill(labels == -100, total), total)
    # Nothing counts: as torch says it.
    assert ours(part, torch.full_like(labels, -100), total).isnan()


def test_the_loss_is_transformers_with_every_option() -> None:
    run_ranks(_like_transformers, 2)


def _masked_words() -> None:
    """All words of one rank are ruled out, as padding of a vocabulary is."""
    place = world()
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    logits[:, 4:] = -torch.inf
    targets = torch.tensor([0, 1, 2, 3, 0])
    words = _words(place, 8)
    exact = logits.clone().requires_grad_()
    expected = nn.functional.cross_entropy(exact, targets, reduction="sum")
    expected.backward()
    part = slice(words.start, words.start + words.count)
    mine = logits[:, part].clone().requires_grad_()
    ours = sliced_cross_entropy(mine, targets, words, ignore_index=-100)
    ours.backward()
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(mine.grad, exact.grad[:, part], rtol=1e-5, atol=1e-7)


def test_words_ruled_out_on_a_whole_rank_change_nothing() -> None:
    run_ranks(_masked_words, 2)


def test_chunks_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words(Peers(IDENTITY, Journal(enabled=False)), 0, 61, 61)
    logits, targets = _tokens(61, 12, scale=3.0, dtype=torch.bfloat16)
    results = []
    for chunk in (1 << 22, 200, 1):
        monkeypatch.setattr(loss_file, "CHUNK_ELEMENTS", chunk)
        leaf = logits.clone().requires_grad_()
        value = sliced_cross_entropy(leaf, targets, words, ignore_index=-100)
        (3 * value).backward()
        results.append((value, leaf.grad))
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(gradient, results[0][1])
