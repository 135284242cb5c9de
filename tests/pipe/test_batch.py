"""Batches in microbatches, weighed by their tokens."""

import pytest
import torch
from torch import Tensor, nn

from hf_speed.errors import ConfigError
from hf_speed.pipe.batch import choose_count, cut, loss_of, num_rows, shifts_labels, weigh
from tests.engine.toys import toy_model

LABELS = frozenset({"labels"})


def test_rows_are_cut_evenly_and_what_has_none_goes_to_all() -> None:
    inputs = {
        "input_ids": torch.arange(10).view(5, 2),
        "position_ids": torch.arange(2).view(1, 2),
        "num_items": torch.tensor(7),
        "use_cache": False,
        "labels": torch.arange(5),
    }
    parts = cut(inputs, 2, last_only=LABELS)
    assert num_rows(inputs) == 5
    assert [part.inputs["input_ids"].shape[0] for part in parts] == [3, 2]
    assert torch.equal(torch.cat([part.inputs["input_ids"] for part in parts]), inputs["input_ids"])
    for part in parts:
        assert part.inputs["position_ids"].shape == (1, 2)
        assert part.inputs["num_items"] == 7
        assert part.inputs["use_cache"] is False
        assert "labels" not in part.inputs
    assert [part.labels["labels"].tolist() for part in parts] == [[0, 1, 2], [3, 4]]


def test_weights_are_shares_of_the_tokens_that_have_a_loss() -> None:
    labels = torch.tensor([[5, 1, 2, 3], [5, -100, -100, 4], [5, -100, -100, -100]])
    parts = cut({"x": torch.zeros(3, 4), "labels": labels}, 3, last_only=LABELS)
    # The first label of a row has no loss in a causal model.
    assert [part.weight for part in weigh(parts, is_shifted=True)] == [3 / 4, 1 / 4, 0.0]
    assert [part.weight for part in weigh(parts, is_shifted=False)] == [4 / 7, 2 / 7, 1 / 7]
    classes = cut({"x": torch.zeros(3, 4), "labels": torch.ones(3)}, 2, last_only=LABELS)
    assert [part.weight for part in weigh(classes, is_shifted=True)] == [2 / 3, 1 / 3]
    empty = cut({"x": torch.zeros(2, 4)}, 2, last_only=LABELS)
    assert [part.weight for part in weigh(empty, is_shifted=False)] == [1 / 2, 1 / 2]


def test_the_count_is_four_a_rank_as_far_as_there_are_rows() -> None:
    assert choose_count(None, rows=100, num_ranks=4) == 16
    assert choose_count(None, rows=3, num_ranks=4) == 3
    assert choose_count(5, rows=5, num_ranks=4) == 5
    with pytest.raises(ConfigError, match=r"microbatches=6 needs a batch of at least 6.*has 5"):
        choose_count(6, rows=5, num_ranks=4)
    with pytest.raises(ConfigError, match=r"none of \['flag'\] is a tensor with rows"):
        num_rows({"flag": True})


def test_a_microbatch_without_tokens_has_no_loss_and_no_gradient() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    nothing = torch.full((2,), -100)
    loss = loss_of(torch.nn.functional.cross_entropy(x, nothing), weight=0.0)
    assert loss == 0.0
    loss.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros(2, 3))
    with pytest.raises(ConfigError, match=r"returned Tensor without a scalar loss"):
        loss_of(torch.ones(3), weight=1.0)


def test_rows_weigh_where_there_are_no_labels() -> None:
    inputs = {"input_ids": torch.zeros(3, 4), "start_positions": torch.zeros(3)}
    parts = weigh(cut(inputs, 2, last_only=frozenset()), is_shifted=False)
    assert [part.weight for part in parts] == [2 / 3, 1 / 3]


class _ShiftsByHand(nn.Module):
    loss_type = None

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """As models did before there was a `loss_function`."""
        shifted = labels[..., 1:].contiguous()
        return nn.functional.cross_entropy(logits[..., :-1, :].flatten(0, 1), shifted.flatten())


class _ShiftsNothing(nn.Module):
    loss_type = "ForCausalLM"

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """A loss of its own, whatever its class is called."""
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(
    ("kind", "shifts"), [("llama", True), ("gpt2", True), ("bert", False), ("t5", False)]
)
def test_whether_a_models_loss_shifts_its_labels(kind: str, shifts: bool) -> None:  # noqa: FBT001
    assert shifts_labels(toy_model(kind)) == shifts


def test_losses_of_a_models_own_are_read() -> None:
    assert shifts_labels(_ShiftsByHand())
    assert not shifts_labels(_ShiftsNothing())
