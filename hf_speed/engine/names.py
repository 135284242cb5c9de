"""The public functions that take a model where the engine's methods take none."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

from torch import Tensor, nn

from hf_speed.engine.engine import Engine
from hf_speed.engine.link import engine_of
from hf_speed.errors import EngineError


def _engine(model: nn.Module) -> Engine:
    engine = engine_of(model)
    if engine is None:
        raise EngineError(
            f"This {type(model).__name__} has no engine. Prepare it with hf_speed's Trainer or "
            f"Accelerator first."
        )
    return engine


def gathered(
    model: nn.Module, names: Sequence[str] | None = None, *, modify: bool = False
) -> AbstractContextManager[None]:
    """Whole parameters inside the scope, at any stage. Collective: every rank enters it.

    Args:
        model: a model with an engine; for one without, nothing needs gathering and nothing happens.
        names: which parameters; None is all. Others of the same unit come along.
        modify: keep the changes that rank 0 makes. With names=None modules may also be resized or
            replaced inside, as `model.resize_token_embeddings` does.
    """
    engine = engine_of(model)
    return nullcontext() if engine is None else engine.gathered(names, modify=modify)


def offload_states(
    model: nn.Module, tier: Literal["host", "disk"] = "host", *, paths: Sequence[str] = ()
) -> int:
    """Free the device memory of a prepared model: parameters, masters, optimizer states.

    Gradients are cleared. No collective; call it on every rank.

    Args:
        model: prepared by hf_speed.
        tier: where to.
        paths: directories of the disk tier; none: offload.paths of the config.

    Returns:
        Bytes that this rank has parked.

    Raises:
        EngineError: the model has no engine, is parked already, or is inside `gathered`.
        OffloadError: the tier has no room.
    """
    return _engine(model).offload_states(tier, paths=paths)


def reload_states(model: nn.Module) -> None:
    """Bring back what `offload_states` took away.

    Raises:
        EngineError: the model has no engine, or nothing is parked.
    """
    _engine(model).reload_states()


def get_full_parameter(model: nn.Module, name: str) -> Tensor:
    """A copy of one whole parameter, in the precision that the optimizer updates. Collective."""
    return _engine(model).get_full_parameter(name)


def set_full_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Overwrite one whole parameter; every rank gives the same value."""
    _engine(model).set_full_parameter(name, value)


def get_full_grad(model: nn.Module, name: str) -> Tensor | None:
    """A copy of one whole gradient, averaged over ranks and unscaled. Collective."""
    return _engine(model).get_full_grad(name)


def set_full_grad(model: nn.Module, name: str, value: Tensor) -> None:
    """Overwrite one whole gradient, between the backward and the step. Collective."""
    _engine(model).set_full_grad(name, value)


def get_full_optimizer_state(model: nn.Module, name: str, key: str) -> Tensor:
    """A copy of one whole optimizer state, for example key="exp_avg". Collective."""
    return _engine(model).get_full_optimizer_state(name, key)


def set_full_optimizer_state(model: nn.Module, name: str, key: str, value: Tensor) -> None:
    """Overwrite one whole optimizer state; every rank gives the same value."""
    _engine(model).set_full_optimizer_state(name, key, value)
