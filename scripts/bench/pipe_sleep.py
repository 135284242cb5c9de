"""Pipeline stages that sleep for their compute time, and the runtimes that drive them.

On two cores, eight stages that compute would wait for cores; eight that sleep wait for each other
only, as on eight devices. A layer is a small nn.Linear and a function of autograd:

    forward   y = linear(x), sleeps F
    backward  gradient of y: sleeps I; gradient of the weight: sleeps W, in the weight's hook

So every runtime is met on its own ground: whoever computes the gradient of the input alone (torch
by asking autograd for it, we by a linear whose weight gradient waits) sleeps I, and W when it comes
to the weight. Each stage is one layer. Every layer writes down what it did, and when.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

WIDTH = 8


class Times(NamedTuple):
    """Seconds that one rank takes for one microbatch, all its stages together."""

    forward: float
    input: float
    weight: float

    def of_stage(self, chunks: int) -> Times:
        """The share of one of `chunks` stages."""
        return Times(*(each / chunks for each in self))

    def __str__(self) -> str:
        return "F={:g} I={:g} W={:g} ms".format(*(1e3 * each for each in self))


class Note(NamedTuple):
    """What one layer did."""

    kind: str
    """F, I or W."""
    stage: int
    start: float
    end: float
    """Both as of time.perf_counter, which all processes of a machine share."""


class _Sleeping(torch.autograd.Function):
    """The identity; its forward sleeps F, its backward I."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: SleepingLayer) -> Tensor:
        ctx.layer = layer
        layer.sleep("F", layer.times.forward)
        # Not a view: torch.distributed.pipelining detaches outputs in place.
        return x.clone()

    @staticmethod
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None]:
        ctx.layer.sleep("I", ctx.layer.times.input)
        return grad, None


class SleepingLayer(nn.Module):
    """A linear that takes `times`; adds what it does to `diary`."""

    def __init__(self, stage: int, times: Times, diary: list[Note]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        self.stage = stage
        self.times = times
        self.diary = diary
        self.linear.weight.register_hook(lambda _: self.sleep("W", times.weight))

    def sleep(self, kind: str, seconds: float) -> None:
        """Sleep, and note it."""
        start = time.perf_counter()
        time.sleep(seconds)
        self.diary.append(Note(kind, self.stage, start, time.perf_counter()))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, WIDTH) -> the same."""
        return _Sleeping.apply(self.linear(x), self)  # type: ignore[no-any-return]


def error_of(output: Tensor, target: Tensor) -> Tensor:
    """The loss."""
    return (output - target).square().mean()


class SleepingModel(nn.Module):
    """The layers in a chain; with labels it returns the loss."""

    def __init__(self, num_stages: int, times: Times, diary: list[Note]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            SleepingLayer(stage, times, diary) for stage in range(num_stages)
        )

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """(rows, WIDTH) -> the same, or a 0-d loss."""
        for layer in self.layers:
            x = layer(x)
        return x if labels is None else error_of(x, labels)


class Case(NamedTuple):
    """One pipeline to run."""

    schedule: str
    """In our names."""
    ranks: int
    microbatches: int
    chunks: int
    """Stages a rank."""
    times: Times


class Batch(NamedTuple):
    """One row a microbatch."""

    x: Tensor
    target: Tensor

    @classmethod
    def make(cls, rows: int) -> Batch:
        """The same on every rank."""
        generator = torch.Generator().manual_seed(1)
        return cls(*(torch.randn(rows, WIDTH, generator=generator) for _ in range(2)))


Step = Callable[[], float | None]
"""Runs one step: forward and backward of the whole batch. The loss, on ranks that know it."""


SCHEDULES = {
    "gpipe": 1,
    "1f1b": 1,
    "interleaved": 2,
    "looped_bfs": 2,
    "zb_h1": 1,
    "zb_h2": 1,
    "zb_v": 2,
    "v_half": 2,
    "dualpipe_v": 2,
}
"""Every schedule of ours, with the stages a rank that it is run with."""

TORCH_SCHEDULES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "Interleaved1F1B",
    "looped_bfs": "LoopedBFS",
    "zb_h1": "InterleavedZeroBubble",
    "zb_v": "ZBVZeroBubble",
    "dualpipe_v": "DualPipeV",
}
"""Schedules that torch.distributed.pipelining has too, under its own names.

Its InterleavedZeroBubble with one stage a rank is ZB-H1.
"""

FOLDED = ("zb_v", "v_half", "dualpipe_v")
"""Schedules that put the first and the last stage on rank 0."""


def stages_of(schedule: str, rank: int, ranks: int, chunks: int) -> list[int]:
    """The stages on `rank`, first to last."""
    if schedule in FOLDED:
        return [rank, 2 * ranks - 1 - rank]
    return [chunk * ranks + rank for chunk in range(chunks)]


def torch_schedule(
    schedule: str,
    modules: Sequence[nn.Module],
    *,
    rank: int,
    ranks: int,
    microbatches: int,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    """A schedule of torch.distributed.pipelining, all at its defaults.

    Args:
        schedule: in our names.
        modules: the stages of this rank, first to last.
        rank: of this process in the default group.
        ranks: its size.
        microbatches: that a batch is cut in.
        loss_fn: (output, target) -> the mean of one microbatch.
    """
    from torch.distributed.pipelining import PipelineStage, schedules

    mine = stages_of(schedule, rank, ranks, len(modules))
    stages: list[Any] = [
        PipelineStage(module, index, ranks * len(modules), torch.device("cpu"))
        for index, module in zip(mine, modules, strict=True)
    ]
    made: Any = schedules.get_schedule_class(TORCH_SCHEDULES[schedule])
    single = issubclass(made, schedules.PipelineScheduleSingle)
    return made(stages[0] if single else stages, microbatches, loss_fn=loss_fn)


def torch_step(made: Any, mine: Sequence[int], x: Tensor, target: Tensor) -> Step:
    """One step of a schedule of torch's, on a batch that every rank has.

    Args:
        made: by `torch_schedule`.
        mine: the stages of this rank.
        x: the batch.
        target: of the loss.
    """
    is_first = 0 in mine
    is_last = max(mine) == made._num_stages - 1

    def step() -> float | None:
        losses: list[Tensor] = []
        # Outputs kept and joined would be a cost that nobody needs.
        made.step(
            *((x,) if is_first else ()),
            return_outputs=False,
            **({"target": target, "losses": losses} if is_last else {}),
        )
        return float(torch.stack(losses).mean()) if is_last else None

    return step


def torch_peer(case: Case, rank: int, diary: list[Note]) -> Step:
    """The case under torch.distributed.pipelining."""
    mine = stages_of(case.schedule, rank, case.ranks, case.chunks)
    model = SleepingModel(case.ranks * case.chunks, case.times.of_stage(case.chunks), diary)
    made = torch_schedule(
        case.schedule,
        [model.layers[stage] for stage in mine],
        rank=rank,
        ranks=case.ranks,
        microbatches=case.microbatches,
        loss_fn=error_of,
    )
    batch = Batch.make(case.microbatches)
    return torch_step(made, mine, batch.x, batch.target)


def ours(case: Case, rank: int, diary: list[Note]) -> Step:  # noqa: ARG001
    """The case under hf_speed."""
    from hf_speed.config import load_config
    from hf_speed.engine import Engine

    pipe: dict[str, object] = {
        "schedule": case.schedule,
        "microbatches": case.microbatches,
        "balance": [1] * (case.ranks * case.chunks),
    }
    if case.schedule in ("interleaved", "looped_bfs"):
        pipe["chunks"] = case.chunks
    model = SleepingModel(case.ranks * case.chunks, case.times.of_stage(case.chunks), diary)
    engine = Engine.attach(model, load_config({"mesh": {"pp": case.ranks}, "pipe": pipe}))
    batch = Batch.make(case.microbatches)

    def step() -> float:
        loss = model(x=batch.x, labels=batch.target)
        engine.backward(loss)
        return loss.item()

    return step


SYSTEMS: dict[str, Callable[[Case, int, list[Note]], Step]] = {"torch": torch_peer, "ours": ours}


class StepRecord(NamedTuple):
    """What one rank did in one step."""

    end: float
    """When the step returned."""
    busy: float
    """Seconds slept."""
    naps: dict[str, int]
    """How often it slept F, I and W."""
    held: float
    """Most forwards whose weight gradient was still to come, in microbatches on a whole rank."""
    loss: float | None


def most_held(diary: Sequence[Note], chunks: int) -> float:
    """The most forwards that waited for their weight gradient, in units of `chunks` of them."""
    here = most = 0
    for note in diary:
        here += {"F": 1, "I": 0, "W": -1}[note.kind]
        most = max(most, here)
    return most / chunks


class Sleeper:
    """One rank of the world: runs any case under any system, each built when it is first asked."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._built: dict[tuple[str, Case], tuple[Step, list[Note]]] = {}

    def run(self, system: str, case: Case, count: int) -> list[StepRecord]:
        """Run `count` steps, one after the other."""
        if (system, case) not in self._built:
            diary: list[Note] = []
            self._built[system, case] = SYSTEMS[system](case, self.rank, diary), diary
        step, diary = self._built[system, case]
        records = []
        for _ in range(count):
            diary.clear()
            loss = step()
            end = time.perf_counter()
            busy = sum(note.end - note.start for note in diary)
            naps = dict(Counter(note.kind for note in diary))
            records.append(StepRecord(end, busy, naps, most_held(diary, case.chunks), loss))
        return records
