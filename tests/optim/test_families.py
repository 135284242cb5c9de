"""Which optimizers can go on from which: what is kept, begun anew, made and dropped."""

from typing import Any

import pytest
import torch

from hf_speed.errors import CheckpointError
from hf_speed.optim import Lion
from hf_speed.optim.families import (
    OptimizerChange,
    counts_in_integers,
    counts_in_tensors,
    mu_product,
    plan_change,
)

ADAM = ("exp_avg", "exp_avg_sq", "step")


def _named(name: str, module: str, *, base: type = torch.optim.Optimizer) -> type[Any]:
    return type(name, (base,), {"__module__": module})


def _change(
    there: str, stored: tuple[str, ...], here: type[Any], **settings: Any
) -> OptimizerChange:
    return plan_change(there, stored, here, [settings], where="out/checkpoint-10")


def test_a_class_keeps_everything_of_its_own_even_what_is_in_no_table() -> None:
    for kind in (torch.optim.AdamW, torch.optim.Rprop, _named("Mine", "mine")):
        change = _change(kind.__name__, ("prev", "step"), kind)
        assert change.is_same
        assert change.kept == {"prev": "prev", "step": "step"}
        assert change.takes("weight_decay")
        assert not change.takes("fused")


@pytest.mark.parametrize("here", [torch.optim.AdamW, torch.optim.RAdam])
def test_members_of_the_adam_family_keep_moments_steps_and_alike_settings(here: type[Any]) -> None:
    change = _change("Adam", ADAM, here)
    assert change.kept == dict(zip(ADAM, ADAM, strict=True))
    assert (change.anew, change.made, change.dropped) == ((), (), ())
    assert not change.is_same
    assert change.takes("betas")
    assert not change.takes("weight_decay")
    assert not change.has_own_rates


def test_what_a_member_lacks_begins_anew_is_made_or_dropped_by_name() -> None:
    assert _change("Adam", ADAM, torch.optim.NAdam).made == ("mu_product",)
    assert _change("NAdam", (*ADAM, "mu_product"), torch.optim.Adam).dropped == ("mu_product",)
    assert _change("Adam", ADAM, torch.optim.AdamW, amsgrad=True).anew == ("max_exp_avg_sq",)
    most = (*ADAM, "max_exp_avg_sq")
    change = _change("Adam", most, torch.optim.AdamW, amsgrad=False)
    assert change.describe() == (
        "kept exp_avg, exp_avg_sq, step; begun anew nothing; dropped max_exp_avg_sq"
    )
    assert "made from the number of steps mu_product" in (
        _change("Adam", ADAM, torch.optim.NAdam).describe()
    )


def test_states_go_by_the_names_that_other_packages_give_them() -> None:
    theirs = _named("AdamW", "bitsandbytes.optim.adamw")
    change = _change("AdamW", ADAM, theirs)
    assert change.kept == {"exp_avg": "state1", "exp_avg_sq": "state2", "step": "step"}
    assert not change.is_same
    assert change.takes("weight_decay")
    assert "exp_avg as state1" in change.describe()
    back = _change("PagedAdamW32bit", ("state1", "state2", "step"), torch.optim.AdamW)
    assert back.kept == {"state1": "exp_avg", "state2": "exp_avg_sq", "step": "step"}
    assert _change("FusedAdam", ADAM, torch.optim.AdamW).kept.keys() == set(ADAM)
    assert _change("AdamW", ADAM, _named("Mine", "mine", base=torch.optim.Adam)).kept


def test_lion_and_rmsprop_go_on_from_the_moment_that_they_share_with_adam() -> None:
    change = _change("AdamW", ADAM, Lion)
    assert change.kept == {"exp_avg": "exp_avg", "step": "step"}
    assert change.dropped == ("exp_avg_sq",)
    assert change.has_own_rates
    change = _change("Adam", ADAM, torch.optim.RMSprop)
    assert change.kept == {"exp_avg_sq": "square_avg", "step": "step"}
    assert change.dropped == ("exp_avg",)
    change = _change("RMSprop", ("square_avg", "step"), torch.optim.Adam)
    assert change.kept == {"square_avg": "exp_avg_sq", "step": "step"}
    assert change.anew == ("exp_avg",)


def test_where_nothing_was_stored_everything_begins() -> None:
    change = _change("SGD", (), torch.optim.AdamW)
    assert change.kept == {}
    assert change.anew == ("exp_avg", "exp_avg_sq")


@pytest.mark.parametrize(
    ("there", "stored", "here", "message"),
    [
        ("Lion", ("exp_avg", "step"), torch.optim.AdamW, r"needs a mean of squared .*Lion does no"),
        ("Adam", ADAM, torch.optim.SGD, r"to which none of its states means anything.*\(Adam, A"),
        ("SGD", ("momentum_buffer",), torch.optim.SGD, None),
        ("SGD", ("momentum_buffer",), Lion, "to which none of its states means anything"),
        ("AdamW8bit", ("state1", "state2"), torch.optim.AdamW, "whose state means something else"),
        ("Mine", ("rows",), torch.optim.AdamW, "whose state means something else. Use Mine, or"),
        ("Adamax", ("exp_avg", "exp_inf", "step"), torch.optim.Adam, "means something else"),
    ],
)
def test_what_means_something_else_is_refused_with_both_names(
    there: str, stored: tuple[str, ...], here: type[Any], message: str | None
) -> None:
    if message is None:
        assert _change(there, stored, here).is_same
        return
    with pytest.raises(CheckpointError, match=message) as caught:
        _change(there, stored, here, momentum=0.9)
    assert f"saved with {there}, but this run uses {here.__name__}" in str(caught.value)
    assert "out/checkpoint-10" in str(caught.value)


def test_nadam_momenta_follow_from_the_number_of_steps() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.NAdam([parameter])
    assert mu_product(0, optimizer.param_groups[0]) == 1.0
    for _ in range(5):
        parameter.grad = torch.ones(2)
        optimizer.step()
    ours = mu_product(5, optimizer.param_groups[0])
    theirs = optimizer.state[parameter]["mu_product"]
    torch.testing.assert_close(torch.tensor(ours), theirs, rtol=1e-6, atol=0.0)
    assert mu_product(1e30, optimizer.param_groups[0]) == 0.0


def test_counters_are_tensors_or_integers_as_their_package_has_it() -> None:
    theirs = _named("DeepSpeedCPUAdam", "deepspeed.ops.adam.cpu_adam")
    assert counts_in_integers(theirs)
    assert not counts_in_tensors(theirs)
    assert counts_in_tensors(torch.optim.AdamW)
    assert counts_in_tensors(Lion)
    assert counts_in_tensors(_named("Mine", "mine", base=torch.optim.Adam))
    assert not counts_in_tensors(_named("Mine", "mine"))
