"""Between a pipeline and the sharding of its stages: what a step gathers, and when it reduces."""

from typing import TYPE_CHECKING

from hf_speed.engine.assemble import Parts
from hf_speed.engine.pipeline import PipelineForward
from hf_speed.pipe.stage import Stage
from hf_speed.zero.gather import Unit

if TYPE_CHECKING:
    from hf_speed.engine.engine import Engine


class StageGradients:
    """The gradients and parameters of a rank's stages, as the pipeline asks for them."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    @property
    def _parts(self) -> Parts:
        return self._engine.parts

    def _units(self, stage: Stage) -> list[Unit]:
        """The units of a stage; the root, which has what is in no layer, is every stage's."""
        own = {id(module) for root in stage.modules for module in root.modules()}
        return [unit for unit in self._parts.units if unit.is_root or id(unit.module) in own]

    def unshard(self, stage: Stage) -> None:
        """Gather a stage's parameters and keep them. Collective over its data-parallel ranks."""
        self._parts.gatherer.hold(self._units(stage))

    def reshard(self, stage: Stage) -> None:
        """Let them go."""
        self._parts.gatherer.let_go(self._units(stage))

    def reduce(self, stage: Stage) -> None:
        """Nothing yet: by which factor they count is known at `loss.backward()`."""

    def check(self) -> None:
        """Raise if the model cannot run as it is."""
        self._engine.check_in_place()

    def begin(self) -> None:
        """Many backwards begin that count as one."""
        self._parts.reducer.begin_collecting()

    def end(self) -> None:
        """They are done."""
        self._parts.reducer.end_collecting()

    @property
    def loss_scale(self) -> float:
        """The factor on the loss in fp16, else 1."""
        return self._engine.loss_scale

    def drop(self) -> None:
        """They do not count: the run has failed, or nobody wants them."""
        self._parts.reducer.drop_collected()

    def commit(self, factor: float) -> None:
        """They count, times `factor`: reduce, if this ends an accumulation. Collective then."""
        sync = self._engine.sync_gradients
        self._parts.reducer.take_collected(factor=factor, sync=sync)
        self._parts.stepper.forget_gradients()


def install_pipeline(engine: "Engine") -> PipelineForward | None:
    """Let calls of an engine's model run its pipeline; None where there is none."""
    parts = engine.parts
    if parts.division.split is None:
        return None
    forward = PipelineForward(
        engine.model,
        parts.division,
        config=parts.config.pipe,
        mesh=parts.mesh,
        gradients=StageGradients(engine),
        gathers=any(group.is_sharded for group in parts.groups),
    )
    engine.model.__dict__["forward"] = forward
    return forward
