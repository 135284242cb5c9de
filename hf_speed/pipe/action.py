"""Action: one thing that one pipeline rank does, as a value.

A backward can be one action (B) or two: the input gradient (I), which the stage before waits for,
and the weight gradient (W), which nobody waits for and which can fill a gap later. The split is
that of zero bubble pipelines (arXiv:2401.10241, section 2).
"""

from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What an action does. The value is its name in a grid."""

    FORWARD = "F"
    BACKWARD = "B"
    """Input and weight gradient at once."""
    INPUT = "I"
    """Input gradient only."""
    WEIGHT = "W"
    """Weight gradient only."""
    SEND_FORWARD = "SF"
    """Send the stage's output to the next stage."""
    RECV_FORWARD = "RF"
    """Receive the stage's input from the stage before."""
    SEND_BACKWARD = "SB"
    """Send the gradient of the stage's input to the stage before."""
    RECV_BACKWARD = "RB"
    """Receive the gradient of the stage's output from the next stage."""
    UNSHARD = "US"
    """Gather the stage's parameters."""
    RESHARD = "RS"
    """Release what UNSHARD gathered."""
    REDUCE = "RD"
    """Reduce the stage's gradients over the data-parallel ranks."""

    # Enum's own is written in Python; plans are dicts and sets of a hundred thousand actions.
    __hash__ = str.__hash__

    @property
    def computes(self) -> bool:
        """Whether the action runs the model."""
        return self in (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT, Kind.WEIGHT)

    @property
    def sends(self) -> bool:
        """Whether the action starts a message to another rank."""
        return self in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)

    @property
    def receives(self) -> bool:
        """Whether the action waits for a message of another rank."""
        return self in (Kind.RECV_FORWARD, Kind.RECV_BACKWARD)


class Action(NamedTuple):
    """`kind` on `stage` for `microbatch`.

    `stage` is always a stage of the rank that runs the action. UNSHARD, RESHARD and REDUCE are of
    no microbatch: theirs is -1.
    """

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        of = f" of microbatch {self.microbatch}" if self.microbatch >= 0 else ""
        return f"{self.kind.name}{of} on stage {self.stage}"


def result_of(action: Action) -> Action:
    """The name of what a compute action makes: B makes the same gradient as I."""
    if action.kind is Kind.BACKWARD:
        return action._replace(kind=Kind.INPUT)
    return action


def needs(action: Action, num_stages: int) -> tuple[Action, ...]:
    """What must be there before a compute action can start, named as by `result_of`."""
    kind, stage, microbatch = action
    if kind is Kind.FORWARD:
        return (Action(Kind.FORWARD, stage - 1, microbatch),) if stage > 0 else ()
    if kind is Kind.WEIGHT:
        return (Action(Kind.INPUT, stage, microbatch),)
    own = Action(Kind.FORWARD, stage, microbatch)
    return (own, Action(Kind.INPUT, stage + 1, microbatch)) if stage + 1 < num_stages else (own,)


OTHER_END = {
    Kind.SEND_FORWARD: (Kind.RECV_FORWARD, 1),
    Kind.RECV_FORWARD: (Kind.SEND_FORWARD, -1),
    Kind.SEND_BACKWARD: (Kind.RECV_BACKWARD, -1),
    Kind.RECV_BACKWARD: (Kind.SEND_BACKWARD, 1),
}
"""The kind at the other end of a message, and how many stages further that end is."""


def counterpart(action: Action) -> Action:
    """The other end of a message: the receive of a send, the send of a receive."""
    kind, further = OTHER_END[action.kind]
    return Action(kind, action.stage + further, action.microbatch)
