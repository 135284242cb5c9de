"""The one loop that runs a plan.

    RECV_FORWARD   the hidden states are expected     F   the stage runs, its graph is kept
    RECV_BACKWARD  their gradient is expected         B   the graph's backward, whole
    SEND_*         start a message, wait for none     I   without the weight gradients, W   those

What happens to gradients and parameters outside of the graph is not known here: hooks on modules
and parameters see ordinary forwards and backwards. A fault prints the grid with the step marked.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_speed.errors import EngineError, HfSpeedError
from hf_speed.mesh.collectives import Pending
from hf_speed.nn.deferred import Queue
from hf_speed.pipe.action import Action, Kind
from hf_speed.pipe.batch import Microbatch, loss_of
from hf_speed.pipe.p2p import Arriving, Links, signature
from hf_speed.pipe.plan import Plan
from hf_speed.pipe.render import fault
from hf_speed.pipe.stage import Stage, StageRunner
from hf_speed.pipe.weights import Switch, generator_state, set_generator_state

At = tuple[int, int]
"""(stage, microbatch)."""


class Shards(Protocol):
    """What a sharding engine does for a stage at its UNSHARD, RESHARD and REDUCE."""

    def unshard(self, stage: Stage) -> None:
        """Gather its parameters and keep them."""
        ...

    def reshard(self, stage: Stage) -> None:
        """Let them go."""
        ...

    def reduce(self, stage: Stage) -> None:
        """Its gradients are complete."""
        ...


class Result(NamedTuple):
    """What a run leaves.

    Attributes:
        loss: the sum of all microbatches', weighed: (1,) fp32 without a graph, on every rank; 0
            where nothing was trained.
        outputs: what the model returned for each microbatch; only on the rank of the last stage,
            and only of plans without a backward.
    """

    loss: Tensor
    outputs: list[Any]


class Runtime(NamedTuple):
    """What a pipeline rank needs to run its row of a plan.

    Attributes:
        rank: of this process along the pipeline.
        stages: of this rank, by index.
        runner: calls the model as one of them.
        links: to other ranks.
        switch: where weight gradients wait.
        shards: gathers and releases parameters.
        device: where modules compute.
    """

    rank: int
    stages: Mapping[int, Stage]
    runner: StageRunner
    links: Links
    switch: Switch
    shards: Shards
    device: torch.device

    def run(
        self,
        plan: Plan,
        microbatches: Sequence[Microbatch],
        *,
        scale: float = 1.0,
        seeds: Sequence[Tensor] | None = None,
    ) -> Result:
        """Run this rank's row of a lowered plan.

        Args:
            plan: for as many microbatches as there are.
            microbatches: of this rank's batch, the same on every pipeline rank.
            scale: factor of every gradient.
            seeds: state of the random generator at the start of each microbatch; None: the
                forward draws nothing.

        Raises:
            EngineError: an action failed; shows the grid with the action marked.
        """
        row = plan.rows[self.rank]
        run = _Run(self, row, microbatches, scale=scale, seeds=seeds)
        try:
            self._carry_out(run, plan)
            result = run.finish()
            self.links.finish()
        except BaseException:
            run.abandon()
            raise
        return result

    def _carry_out(self, run: "_Run", plan: Plan) -> None:
        for action in plan.rows[self.rank]:
            try:
                run.do(action)
            except HfSpeedError as error:
                error.add_note(fault(plan, f"{action}", rank=self.rank, action=action))
                raise
            except Exception as error:
                why = f"{action}: {type(error).__name__}: {error}"
                raise EngineError(fault(plan, why, rank=self.rank, action=action)) from error


class _Run:
    """One run: the tensors on their way, by stage and microbatch."""

    def __init__(
        self,
        runtime: Runtime,
        row: Sequence[Action],
        microbatches: Sequence[Microbatch],
        *,
        scale: float,
        seeds: Sequence[Tensor] | None,
    ) -> None:
        self._runtime = runtime
        self._microbatches = microbatches
        self._likes = [signature(each.inputs) for each in microbatches]
        self._scale = scale
        self._seeds = seeds
        self._splits = {_at(action) for action in row if action.kind is Kind.WEIGHT}
        self._trains = any(action.kind in (Kind.BACKWARD, Kind.INPUT) for action in row)
        self._has_last = any(stage.is_last for stage in runtime.stages.values())
        self._arriving: dict[At, Arriving] = {}
        self._inputs: dict[At, Tensor] = {}
        self._outputs: dict[At, Tensor] = {}
        self._gradients: dict[At, Tensor | Arriving] = {}
        self._queues: dict[At, Queue] = {}
        self._states: dict[At, Tensor] = {}
        self._unsharded: list[Stage] = []
        self._losses: list[Tensor] = []
        self._outputs_of_last: list[Any] = []
        # NCCL pairs messages between two ranks in the order in which they start, so there the loss
        # comes last on both sides; gloo pairs them by tag.
        self._loss: Pending[Tensor] | None = None
        if self._trains and not self._has_last and runtime.device.type == "cpu":
            self._loss = runtime.links.receive_loss()

    def do(self, action: Action) -> None:
        """Carry out one action."""
        match action.kind:
            case Kind.FORWARD:
                self._forward(action)
            case Kind.BACKWARD | Kind.INPUT | Kind.WEIGHT:
                # The caller's autocast is for forwards: in a backward it would cast, a second time,
                # what some forward has computed in fp32 on purpose.
                with torch.autocast(self._runtime.device.type, enabled=False):
                    self._backward(action)
            case Kind.UNSHARD:
                self._runtime.shards.unshard(self._stage(action))
                self._unsharded.append(self._stage(action))
            case Kind.RESHARD:
                self._unsharded.remove(self._stage(action))
                self._runtime.shards.reshard(self._stage(action))
            case Kind.REDUCE:
                self._runtime.shards.reduce(self._stage(action))
            case _:
                self._move(action)

    def finish(self) -> Result:
        """What the run leaves, after its last action."""
        if not self._trains:
            return Result(torch.zeros(1, device=self._runtime.device), self._outputs_of_last)
        links = self._runtime.links
        if self._has_last:
            if self._runtime.device.type != "cpu":
                links.send_loss(self._total())
            return Result(self._total(), [])
        loss = links.receive_loss() if self._loss is None else self._loss
        return Result(loss.wait(), [])

    def abandon(self) -> None:
        """An action has failed: let go of parameters and of what was to come. No collective."""
        arriving = [*self._arriving.values(), *self._gradients.values()]
        coming = [each for one in arriving if isinstance(one, Arriving) for each in one.messages]
        self._runtime.links.abandon(coming if self._loss is None else [*coming, self._loss])
        for stage in self._unsharded:
            self._runtime.shards.reshard(stage)

    def _total(self) -> Tensor:
        return torch.stack(self._losses).float().sum().view(1)

    def _stage(self, action: Action) -> Stage:
        return self._runtime.stages[action.stage]

    def _move(self, action: Action) -> None:
        """Start a message; those that arrive are waited for where they are used."""
        links, at = self._runtime.links, _at(action)
        stage, microbatch = at
        like = self._likes[microbatch]
        match action.kind:
            case Kind.SEND_FORWARD:
                links.send_forward(
                    stage,
                    microbatch,
                    self._outputs[at].detach(),
                    like=like,
                    generator=self._states.pop(_next(at), None),
                )
                if not self._trains:
                    del self._outputs[at]
            case Kind.RECV_FORWARD:
                generator = None if self._seeds is None else self._seeds[microbatch]
                self._arriving[at] = links.receive_forward(
                    stage, microbatch, like=like, generator=generator
                )
            case Kind.SEND_BACKWARD:
                gradient = self._gradients.pop((stage - 1, microbatch))
                if isinstance(gradient, Tensor):
                    links.send_backward(stage, microbatch, gradient)
            case _:
                self._gradients[at] = links.receive_backward(stage, microbatch, self._outputs[at])

    def _forward(self, action: Action) -> None:
        at, stage = _at(action), self._stage(action)
        microbatch = self._microbatches[action.microbatch]
        received = self._receive(at)
        inputs = {**microbatch.inputs, **(microbatch.labels if stage.is_last else {})}
        if at in self._splits:
            self._queues[at] = Queue()
        if self._seeds is not None:
            state = self._states.pop(at) if received is not None else self._seeds[at[1]]
            set_generator_state(state, self._runtime.device)
        with self._runtime.switch.to(self._queues.get(at)):
            output = self._runtime.runner(stage, inputs, received)
        if stage.is_last:
            self._finish_forward(at, output, microbatch.weight)
            return
        self._outputs[at] = output
        if self._seeds is not None:
            self._states[_next(at)] = generator_state(self._runtime.device)
        if _next(at)[0] in self._runtime.stages:
            self._inputs[_next(at)] = output.detach().requires_grad_(self._trains)

    def _receive(self, at: At) -> Tensor | None:
        """The hidden states from the stage before, as a leaf; None on the first stage."""
        if at[0] == 0:
            return None
        if at in self._arriving:
            arriving = self._arriving.pop(at)
            self._inputs[at] = arriving.value.wait().requires_grad_(self._trains)
            if arriving.generator is not None:
                self._states[at] = arriving.generator.wait()
        return self._inputs[at] if self._trains else self._inputs.pop(at)

    def _finish_forward(self, at: At, output: Any, weight: float) -> None:
        if not self._trains:
            self._outputs_of_last.append(output)
            return
        loss = loss_of(output, weight=weight)
        self._outputs[at] = loss
        self._losses.append(loss.detach())
        if len(self._losses) == len(self._microbatches) and self._runtime.device.type == "cpu":
            self._runtime.links.send_loss(self._total())

    def _backward(self, action: Action) -> None:
        at, stage = _at(action), self._stage(action)
        if action.kind is Kind.WEIGHT:
            self._queues.pop(at).drain()
            return
        output = self._outputs.pop(at)
        if stage.is_last:
            gradient = torch.full_like(output, self._scale)
        else:
            arrived = self._gradients.pop(at)
            gradient = arrived if isinstance(arrived, Tensor) else arrived.value.wait()
        # A checkpoint runs the forward again in here: its linears ask the switch again.
        with self._runtime.switch.to(self._queues.get(at)):
            if output.requires_grad:
                torch.autograd.backward(output, gradient)
        if not stage.is_first:
            received = self._inputs.pop(at)
            below = (stage.index - 1, action.microbatch)
            self._gradients[below] = (
                torch.zeros_like(received) if received.grad is None else received.grad
            )


def _at(action: Action) -> At:
    return action.stage, action.microbatch


def _next(at: At) -> At:
    return at[0] + 1, at[1]
