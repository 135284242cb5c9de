"""Whose gradients are clipped: shards can be clipped only together."""

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from hf_speed.engine import Engine
from hf_speed.errors import ConfigError


def ids_of(parameters: Iterable[Tensor]) -> set[int]:
    """Their identities."""
    return {id(parameter) for parameter in parameters}


def parameters_of(engine: Engine) -> Iterator[Tensor]:
    """Those of an engine's model, also of stages that are on other ranks."""
    yield from engine.model.parameters()
    yield from engine.parts.division.removed.values()


def engine_to_clip(engines: Sequence[Engine], parameters: Iterable[Tensor]) -> Engine | None:
    """The engine whose model's parameters these are; None where no engine has them.

    The answer is the same on all ranks, of which in a pipeline some may train nothing themselves.

    Raises:
        ConfigError: they are some of a model's trainable parameters but not all, or of two models.
    """
    given = ids_of(parameters)
    found: list[Engine] = []
    for engine in engines:
        trained = ids_of(each for each in engine.model.parameters() if each.requires_grad)
        held = set[int]()
        if engine.optimizer is not None:
            held = ids_of(
                each for group in engine.optimizer.param_groups for each in group["params"]
            )
        here = bool(given & ids_of(engine.model.parameters()))
        elsewhere = not trained and _trains(engine) and (here or not given)
        if elsewhere or (trained and trained <= given) or (held and held <= given):
            found.append(engine)
        elif given & (trained | held):
            raise ConfigError(
                f"Clipping got {len(given & (trained | held))} of the {len(trained)} trainable "
                f"parameters of {type(engine.model).__name__}; their gradients live in shards that "
                f"can be clipped only together. Pass model.parameters()."
            )
    if len(found) > 1:
        raise ConfigError(
            f"Clipping got the parameters of {len(found)} prepared models at once. Clip each model "
            f"by itself, or prepare one nn.Module that holds them all."
        )
    return found[0] if found else None


def _trains(engine: Engine) -> bool:
    return any(record.trainable for record in engine.parts.catalogue.records.values())
