"""save_state and load_state: the engines' share of what accelerate does.

accelerate names the directory, limits their number, and saves schedulers, samplers, RNG and custom
objects itself. For the length of a call, optimizers that an engine steps are hidden from it (their
state is in shards), and one more hook, after the user's own, writes or reads the engines.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn

from hf_speed.engine import Engine, engine_of
from hf_speed.integrations.accelerate.optimizer import SpeedOptimizer
from hf_speed.integrations.weights import load_model, restore_rng, write_model


class Host(Protocol):
    """What is asked of an Accelerator."""

    _models: list[Any]
    _optimizers: list[Any]
    state_weights: list[tuple[Engine, dict[str, Any]]] | None
    register_save_state_pre_hook: Any
    register_load_state_pre_hook: Any


def _directories(accelerator: Host, root: str) -> list[tuple[Engine, str]]:
    """Where each engine's model goes: the directory itself, or one for each of several."""
    engines = [engine_of(model) for model in accelerator._models]
    alone = len(engines) == 1
    return [
        (engine, root if alone else f"{root}/model_{index}")
        for index, engine in enumerate(engines)
        if engine is not None
    ]


@contextlib.contextmanager
def _without_bound_optimizers(accelerator: Host) -> Iterator[None]:
    everything = accelerator._optimizers
    accelerator._optimizers = [
        each
        for each in everything
        if not (isinstance(each, SpeedOptimizer) and each.engine is not None)
    ]
    try:
        yield
    finally:
        accelerator._optimizers = everything


@contextlib.contextmanager
def engines_save(accelerator: Host) -> Iterator[None]:
    """While it lasts, accelerate's save_state also writes the engines."""
    accelerator.state_weights = []

    def hook(_models: list[nn.Module], weights: list[dict[str, Any]], directory: str) -> None:
        placeholders = {id(state): engine for engine, state in accelerator.state_weights or ()}
        # A hook of the user's that saved a model itself has taken its weights out of the list.
        unsaved = [placeholders[id(state)] for state in weights if id(state) in placeholders]
        weights[:] = [state for state in weights if id(state) not in placeholders]
        for engine, home in _directories(accelerator, directory):
            if any(each is engine for each in unsaved):
                write_model(engine, home)
            engine.save(home)

    handle = accelerator.register_save_state_pre_hook(hook)
    try:
        with _without_bound_optimizers(accelerator):
            yield
    finally:
        handle.remove()
        accelerator.state_weights = None


@contextlib.contextmanager
def engines_load(accelerator: Host) -> Iterator[None]:
    """While it lasts, accelerate's load_state also reads the engines."""
    read: list[tuple[Engine, str]] = []

    def hook(models: list[nn.Module], directory: str) -> None:
        for engine, home in _directories(accelerator, directory):
            # A hook of the user's that loaded a model itself has taken it out of the list.
            if any(engine_of(model) is engine for model in models):
                load_model(engine, home)
            engine.load(home)
            read.append((engine, home))
        models[:] = [model for model in models if engine_of(model) is None]

    handle = accelerator.register_load_state_pre_hook(hook)
    try:
        with _without_bound_optimizers(accelerator):
            yield
        for engine, home in read:
            restore_rng(engine, home)
    finally:
        handle.remove()
