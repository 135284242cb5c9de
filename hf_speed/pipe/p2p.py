"""Messages between stages: hidden states forwards, their gradients backwards.

A receiver has to know a shape before it can receive. Stages see the same batch, so a shape that was
met before is known from the shapes of the microbatch; where it is new, a header of a few numbers
goes ahead of the message, once. The gradient of an output has the output's own shape.

With a message may go the state of the random generator, for dropout that does not depend on how
the model is cut.
"""

from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_speed.errors import MeshError
from hf_speed.mesh import AxisGroup, Lane, ParallelMesh
from hf_speed.mesh.collectives import Pending
from hf_speed.mesh.messages import receive, send
from hf_speed.pipe.stage import LayerKind

MAX_DIMS = 6
HEADER_NUMEL = MAX_DIMS + 3
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

PARTS = 4
"""Messages that one action may send, each with a tag of its own: header, values, generator."""


TAGS = 1 << 24
"""Of one run; the last of them are the loss's."""

RUNS = 64
"""Runs until tags come again: what is left of a run that failed must not be taken for another's."""


class Shape(NamedTuple):
    """What a receiver has to know."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Address(NamedTuple):
    """One message: from or to a pipeline rank, and what tells it apart from others."""

    peer: int
    tag: int


class Links:
    """The messages of one pipeline rank.

    Args:
        mesh: of the run; its `pp` axis.
        placement: stage -> pipeline rank.
        kind: of the model's layers; what the stage before has learnt of it comes with a header.
    """

    def __init__(self, mesh: ParallelMesh, placement: Sequence[int], kind: LayerKind) -> None:
        self._kind = kind
        self._placement = tuple(placement)
        self._device = mesh.device
        self._journal = mesh.journal
        self._forward = mesh.axis("pp", lane=Lane.FORWARD)
        self._backward = mesh.axis("pp", lane=Lane.BACKWARD)
        self._shapes: dict[tuple[int, Hashable], Shape] = {}
        self._sent_shapes: set[tuple[int, Hashable]] = set()
        self._leaving: deque[Pending[Tensor]] = deque()
        self._lost: list[Pending[Tensor]] = []
        self._has_tags = mesh.device.type == "cpu"
        self._run = 0

    def begin(self) -> None:
        """Start a run. As often on every rank, whether or not the one before has ended well.

        Raises:
            MeshError: one before has not, and nothing tells its messages from new ones.
        """
        if self._lost and not self._has_tags:
            raise MeshError(
                "An earlier run of this pipeline failed with messages under way, which NCCL would "
                "take for those of this one: it pairs messages by their order. Call "
                "engine.detach() and prepare the model again, or resume from the last checkpoint."
            )
        self._run = (self._run + 1) % RUNS

    def abandon(self, coming: Iterable[Pending[Tensor]]) -> None:
        """A run has failed: wait for none of its messages, and tell shapes anew in the next.

        Args:
            coming: what was to be received.
        """
        # Kept, for they may still arrive: their memory must not be used for anything else.
        self._lost += [*self._leaving, *coming]
        self._leaving.clear()
        self._shapes.clear()
        self._sent_shapes.clear()

    def _address(self, stage: int, other: int, microbatch: int) -> Address:
        # Of the sending and the receiving stage only one is named: the lower one, on both sides.
        lower = min(stage, other)
        tag = (microbatch * len(self._placement) + lower) * PARTS
        return Address(self._placement[other], self._run * TAGS + tag % (TAGS - PARTS))

    def send_forward(
        self,
        stage: int,
        microbatch: int,
        value: Tensor,
        *,
        like: Hashable,
        generator: Tensor | None = None,
    ) -> None:
        """Start to send a stage's output to the next stage.

        Args:
            stage: the sender.
            microbatch: its number.
            value: detached.
            like: shapes of the microbatch; equal ones have outputs of equal shapes.
            generator: state of the random generator, to go on with.
        """
        address = self._address(stage, stage + 1, microbatch)
        if (stage, like) not in self._sent_shapes:
            self._sent_shapes.add((stage, like))
            header = _header(value, self._device, returns_tuple=self._kind.returns_tuple)
            self._send(header, address, 0, self._forward)
        self._send(value.contiguous(), address, 1, self._forward)
        if generator is not None:
            self._send(generator.to(self._device), address, 2, self._forward)

    def receive_forward(
        self, stage: int, microbatch: int, *, like: Hashable, generator: Tensor | None = None
    ) -> "Arriving":
        """Start to receive a stage's input from the stage before.

        Args:
            stage: the receiver.
            microbatch: its number.
            like: as on the sender's side.
            generator: a tensor like the state that comes along; None: none comes.
        """
        address = self._address(stage, stage - 1, microbatch)
        known = self._shapes.get((stage, like))
        if known is None:
            header = torch.empty(HEADER_NUMEL, dtype=torch.int64, device=self._device)
            numbers = self._receive(header, address, 0, self._forward).wait().tolist()
            code, returns_tuple, dims, *sizes = numbers
            self._kind.returns_tuple = bool(returns_tuple)
            known = Shape(tuple(sizes[:dims]), _DTYPES[code])
            self._shapes[stage, like] = known
        buffer = torch.empty(known.shape, dtype=known.dtype, device=self._device)
        value = self._receive(buffer, address, 1, self._forward)
        state = None
        if generator is not None:
            room = torch.empty_like(generator, device=self._device)
            state = self._receive(room, address, 2, self._forward)
        return Arriving(value, state)

    def send_backward(self, stage: int, microbatch: int, gradient: Tensor) -> None:
        """Start to send the gradient of a stage's input to the stage before."""
        address = self._address(stage, stage - 1, microbatch)
        self._send(gradient.contiguous(), address, 3, self._backward)

    def receive_backward(self, stage: int, microbatch: int, output: Tensor) -> "Arriving":
        """Start to receive the gradient of a stage's output from the next stage."""
        address = self._address(stage, stage + 1, microbatch)
        buffer = torch.empty_like(output, memory_format=torch.contiguous_format)
        return Arriving(self._receive(buffer, address, 3, self._backward), None)

    def send_loss(self, value: Tensor) -> None:
        """Start to send the last stage's loss to every other pipeline rank.

        As messages, while the other ranks still have backwards to run: a broadcast at the end would
        hold the last stage until they come.
        """
        for peer in range(self._forward.size):
            if peer != self._forward.rank:
                self._send(value, self._loss_address(peer), 0, self._forward)

    def receive_loss(self) -> Pending[Tensor]:
        """Start to receive it: (1,) fp32."""
        room = torch.empty(1, dtype=torch.float32, device=self._device)
        return self._receive(room, self._loss_address(self._placement[-1]), 0, self._forward)

    def _loss_address(self, peer: int) -> Address:
        return Address(peer, self._run * TAGS + TAGS - PARTS)

    def _send(self, value: Tensor, address: Address, part: int, group: AxisGroup) -> None:
        self._leaving.append(
            send(value, to=address.peer, tag=address.tag + part, group=group, journal=self._journal)
        )

    def _receive(
        self, buffer: Tensor, address: Address, part: int, group: AxisGroup
    ) -> Pending[Tensor]:
        return receive(buffer, source=address.peer, tag=address.tag + part, group=group)

    def finish(self) -> None:
        """Wait until everything has left."""
        while self._leaving:
            self._leaving.popleft().wait()


class Arriving(NamedTuple):
    """A message under way: its values, and the generator's state if one comes along."""

    value: Pending[Tensor]
    generator: Pending[Tensor] | None

    @property
    def messages(self) -> list[Pending[Tensor]]:
        """Both."""
        return [self.value] if self.generator is None else [self.value, self.generator]


def signature(inputs: Mapping[str, object]) -> Hashable:
    """The shapes of a microbatch: what the shapes of hidden states depend on."""
    return tuple(
        (name, tuple(value.shape)) for name, value in inputs.items() if isinstance(value, Tensor)
    )


def _header(value: Tensor, device: torch.device, *, returns_tuple: bool) -> Tensor:
    if value.dim() > MAX_DIMS or value.dtype not in _DTYPES:
        raise MeshError(
            f"Hidden states of shape {tuple(value.shape)} and {value.dtype} cannot travel between "
            f"stages: at most {MAX_DIMS} dims of a floating-point dtype."
        )
    numbers = [_DTYPES.index(value.dtype), int(returns_tuple), value.dim(), *value.shape]
    numbers += [0] * (HEADER_NUMEL - len(numbers))
    return torch.tensor(numbers, dtype=torch.int64, device=device)
