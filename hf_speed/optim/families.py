"""Which states of one optimizer mean the same in another one.

    change = plan_change("Adam", {"exp_avg", "exp_avg_sq", "step"}, torch.optim.NAdam, groups)
    change.kept         {"exp_avg": "exp_avg", ...}       stored name -> name here
    change.anew         {"max_exp_avg_sq"}                begins as at the first step
    change.made         {"mu_product"}                    follows from the number of steps
    change.dropped      what has no use here
    change.settings     which hyperparameters the stored run decides

A form says what a class keeps, by meaning. What it cannot begin anew in the middle of a run is
needed: a mean of squares of zero beside a counter of 1000 steps would make the next steps huge.
Where such a state is not stored, or nothing stored has a use, the change is refused.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from hf_speed.errors import CheckpointError

STEP = "step"
MU_PRODUCT = "mu_product"

_HOW = ("foreach", "fused", "capturable", "differentiable")
"""Settings that say how a step is computed and not what: always those of the run."""

_ALIKE = ("lr", "initial_lr", "betas", "eps", "maximize")
"""Settings that mean the same to all members of a family. Weight decay does not (Adam, AdamW)."""


class _State(NamedTuple):
    """One state of a form.

    Attributes:
        meaning: the same in every form that can go on with it.
        names: that classes give it; the first is torch's, the second bitsandbytes'.
        needed: whether it cannot begin anew in the middle of a run.
        when: whether a group with these settings keeps it.
    """

    meaning: str
    names: tuple[str, ...]
    needed: bool = False
    when: Callable[[Mapping[str, Any]], bool] = lambda _: True


class _Form(NamedTuple):
    """What the classes of one family keep.

    Attributes:
        family: its settings mean the same to all members.
        states: tensors of the parameter's shape.
        counters: numbers.
    """

    family: str
    states: tuple[_State, ...]
    counters: tuple[_State, ...] = (_State("steps", (STEP,)),)

    def find(self, kind: str) -> _State | None:
        """What a state of this name is."""
        return next((each for each in (*self.states, *self.counters) if kind in each.names), None)


_MEAN = _State("mean of gradients", ("exp_avg", "state1"))
_SQUARE = _State("mean of squared gradients", ("exp_avg_sq", "state2"), needed=True)
_LARGEST = _State(
    "largest mean of squared gradients",
    ("max_exp_avg_sq",),
    when=lambda group: bool(group.get("amsgrad")),
)
_ADAM = _Form("Adam", (_MEAN, _SQUARE, _LARGEST))
_NADAM = _Form("Adam", (_MEAN, _SQUARE), (*_ADAM.counters, _State("momenta so far", (MU_PRODUCT,))))
_LION = _Form("Lion", (_MEAN,))
_SGD = _Form(
    "SGD",
    (_State("velocity", ("momentum_buffer", "state1"), when=lambda g: bool(g.get("momentum"))),),
    counters=(),
)
_RMSPROP = _Form(
    "RMSprop",
    (
        _SQUARE._replace(names=("square_avg", "state1")),
        _MEAN._replace(names=("grad_avg",), when=lambda group: bool(group.get("centered"))),
        _State(
            "velocity of scaled gradients",
            ("momentum_buffer",),
            when=lambda group: bool(group.get("momentum")),
        ),
    ),
)

_FORMS: Mapping[str, _Form] = {
    **dict.fromkeys(("Adam", "AdamW", "RAdam"), _ADAM),
    # apex and DeepSpeed.
    **dict.fromkeys(("FusedAdam", "DeepSpeedCPUAdam", "FusedAdamW"), _ADAM),
    # bitsandbytes.
    **dict.fromkeys(("PagedAdam", "PagedAdamW", "Adam32bit", "AdamW32bit"), _ADAM),
    **dict.fromkeys(("PagedAdam32bit", "PagedAdamW32bit"), _ADAM),
    "NAdam": _NADAM,
    **dict.fromkeys(("Lion", "FusedLion", "DeepSpeedCPULion", "Lion32bit"), _LION),
    **dict.fromkeys(("PagedLion", "PagedLion32bit"), _LION),
    **dict.fromkeys(("SGD", "FusedSGD", "SGD32bit"), _SGD),
    **dict.fromkeys(("RMSprop", "RMSprop32bit"), _RMSPROP),
}
"""By class name: a checkpoint has no more than that."""


class OptimizerChange(NamedTuple):
    """How the stored states of one optimizer become those of another.

    Attributes:
        there: class that was saved.
        here: class that goes on.
        kept: stored name -> name here, tensors and counters.
        anew: states that begin as at the first step.
        made: counters that follow from the number of steps.
        dropped: stored names without a use here.
        settings: hyperparameters that the stored run decides; None: all that say what is computed.
    """

    there: str
    here: str
    kept: Mapping[str, str]
    anew: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    settings: frozenset[str] | None = None

    @property
    def is_same(self) -> bool:
        """Whether states and settings are those of the class that was saved."""
        return self.settings is None and all(old == new for old, new in self.kept.items())

    @property
    def has_own_rates(self) -> bool:
        """Whether learning rates mean something else here than in the run that was saved."""
        return not self.takes("lr")

    def takes(self, setting: str) -> bool:
        """Whether the stored run decides this hyperparameter."""
        if setting in _HOW:
            return False
        return self.settings is None or setting in self.settings

    def describe(self) -> str:
        """The one list: what was kept, what begins anew, what was dropped."""
        kept = [old if old == new else f"{old} as {new}" for old, new in self.kept.items()]
        parts = [f"kept {_list(kept)}"]
        if self.made:
            parts.append(f"made from the number of steps {_list(self.made)}")
        parts += [f"begun anew {_list(self.anew)}", f"dropped {_list(self.dropped)}"]
        return "; ".join(parts)


def plan_change(
    there: str,
    stored: Iterable[str],
    here: type[torch.optim.Optimizer],
    groups: Sequence[Mapping[str, Any]],
    *,
    where: str,
) -> OptimizerChange:
    """How an optimizer goes on from what another one has left.

    Args:
        there: name of the class that was saved.
        stored: names of all states and counters that it has saved, masters left out.
        here: class that goes on.
        groups: its param_groups, which say what it keeps.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: what is stored means something else to `here`, or lacks what it needs.
    """
    kinds, name = sorted(stored), here.__name__
    source, target = _FORMS.get(there), _form_of(here)
    if there == name and (source is None or not _is_renamed(kinds, source, here)):
        return OptimizerChange(there, name, dict(zip(kinds, kinds, strict=True)))
    if source is None or target is None:
        raise _refusal(where, there, name, "whose state means something else")
    change = _translate(there, kinds, here, groups)
    wanted = _wanted(target, groups)
    reached = {change.kept[kind] for kind in change.kept}
    if not kinds:
        return change
    lacking = [each for each in wanted if each.needed and _own(each, here) not in reached]
    if lacking:
        why = f"which needs a {lacking[0].meaning} ({_own(lacking[0], here)})"
        raise _refusal(where, there, name, f"{why} that {there} does not keep")
    if not reached - {STEP}:
        raise _refusal(where, there, name, "to which none of its states means anything")
    return change


def _translate(
    there: str,
    kinds: Sequence[str],
    here: type[torch.optim.Optimizer],
    groups: Sequence[Mapping[str, Any]],
) -> OptimizerChange:
    source, target = _FORMS[there], _form_of(here)
    wanted = () if target is None else _wanted(target, groups)
    by_meaning = {state.meaning: _own(state, here) for state in wanted}
    kept: dict[str, str] = {}
    for kind in kinds:
        state = source.find(kind)
        if state is not None and state.meaning in by_meaning:
            kept[kind] = by_meaning[state.meaning]
    missing = [_own(state, here) for state in wanted if _own(state, here) not in kept.values()]
    is_of_family = target is not None and source.family == target.family
    same_class = there == here.__name__
    return OptimizerChange(
        there,
        here.__name__,
        kept,
        anew=tuple(each for each in missing if each not in (STEP, MU_PRODUCT)),
        made=tuple(each for each in missing if each == MU_PRODUCT),
        dropped=tuple(kind for kind in kinds if kind not in kept),
        settings=None if same_class else frozenset(_ALIKE if is_of_family else ()),
    )


def _form_of(kind: type[torch.optim.Optimizer]) -> _Form | None:
    """Of the class, or of the nearest one that it extends."""
    return next((_FORMS[each.__name__] for each in kind.__mro__ if each.__name__ in _FORMS), None)


def _wanted(form: _Form, groups: Sequence[Mapping[str, Any]]) -> tuple[_State, ...]:
    """What these settings keep."""
    states = (each for each in form.states if any(each.when(group) for group in groups))
    return (*states, *form.counters)


def _own(state: _State, kind: type[torch.optim.Optimizer]) -> str:
    """The name that a class gives a state."""
    foreign = kind.__module__.partition(".")[0] == "bitsandbytes" and len(state.names) > 1
    return state.names[1] if foreign else state.names[0]


def _is_renamed(kinds: Sequence[str], form: _Form, here: type[torch.optim.Optimizer]) -> bool:
    """Whether a class of the same name, of another package, has saved these."""
    known = [(kind, form.find(kind)) for kind in kinds]
    return any(state is not None and kind != _own(state, here) for kind, state in known)


def is_of_parameter_shape(there: str, kind: str) -> bool:
    """Whether a class is known to keep this state in its parameter's shape."""
    form = _FORMS.get(there)
    return form is not None and form.find(kind) is not None


def counts_in_tensors(kind: type[torch.optim.Optimizer]) -> bool:
    """Whether a class keeps its counters as torch's do, and not as Python numbers."""
    bases = [each for each in kind.__mro__ if each not in (torch.optim.Optimizer, object)]
    return any(each.__module__.partition(".")[0] in ("torch", "hf_speed") for each in bases)


def counts_in_integers(kind: type[torch.optim.Optimizer]) -> bool:
    """Whether a class is known to keep its number of steps as a Python integer."""
    return kind.__module__.partition(".")[0] in ("apex", "bitsandbytes", "deepspeed")


def mu_product(step: float, settings: Mapping[str, Any]) -> float:
    """What NAdam has multiplied up after `step` steps (its momenta, which warm up).

    Source: Incorporating Nesterov Momentum into Adam, Dozat 2016, algorithm 8; as torch computes.
    """
    product, decay = 1.0, float(settings["momentum_decay"])
    for number in range(1, int(min(step, 1e6)) + 1):
        product *= settings["betas"][0] * (1.0 - 0.5 * 0.96 ** (number * decay))
        if product < 1e-45:
            return 0.0
    return product


def _refusal(where: str, there: str, here: str, why: str) -> CheckpointError:
    source = _FORMS.get(there)
    others = sorted(
        name for name, form in _FORMS.items() if source is form and hasattr(torch.optim, name)
    )
    like = f" or one that keeps the same ({', '.join(others)})" if others else ""
    return CheckpointError(
        f"{where} was saved with {there}, but this run uses {here}, {why}. Use {there}{like}, or "
        f"start from the weights alone with from_pretrained."
    )


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
