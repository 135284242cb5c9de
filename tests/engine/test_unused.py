"""Parameters that a step does not use, on one rank or on all, and blocks that ranks leave out."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_speed.engine import Engine
from tests.engine.toys import (
    Tower,
    assert_same_values,
    plain_parameters,
    rank_here,
    speed,
    tower_rows,
    whole_parameters,
)
from tests.support import run_ranks

STAGES = (0, 1, 2, 3)
Pair = tuple[dict[str, Tensor], dict[str, Tensor]]

NUM_BLOCKS = 10
"""More than prefetched units and reductions in flight together: a wait for a rank that waits for
this one would show."""


def _skips(step: int) -> tuple[int, ...]:
    """Blocks that this rank leaves out: even ranks the low ones first, odd ones the high ones."""
    blocks = range(NUM_BLOCKS)
    by_rank = [blocks[step : step + 4], blocks[NUM_BLOCKS - 4 - step : NUM_BLOCKS - step]]
    return tuple(by_rank[rank_here() % 2])


class Choice(nn.Module):
    """One of two layers runs, as with experts; a third never does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.never = (nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: Tensor, branch: str) -> Tensor:
        """The layer named by `branch`."""
        return x + (self.a if branch == "a" else self.b)(x).tanh()


class Chooser(nn.Module):
    """Blocks that each choose a branch, and a layer of the root that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(Choice() for _ in range(NUM_BLOCKS))
        self.unused = nn.Linear(5, 5)
        self.outlet = nn.Linear(5, 1)

    def forward(self, x: Tensor, branches: str) -> Tensor:
        """(rows, 5) -> 0-d loss; a letter for each block."""
        for block, branch in zip(self.blocks, branches, strict=True):
            x = block(x, branch)
        return self.outlet(x).square().mean()


def _beside_ddp(
    make: Callable[[], nn.Module],
    stage: int,
    forward: Callable[[nn.Module, int], Tensor],
    *,
    journal: bool = False,
    dp_replicate: int = 1,
) -> Pair:
    """Parameters after three steps of AdamW with weight decay, by an engine and by DDP."""
    ours, theirs = make(), make()
    debug, mesh = {"timeout_s": 20.0, "journal": journal}, {"dp_replicate": dp_replicate}
    engine = Engine.attach(ours, speed(stage, debug=debug, mesh=mesh))
    our_optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2, weight_decay=0.1)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1)
    engine.bind_optimizer(our_optimizer)
    peer = DistributedDataParallel(theirs, find_unused_parameters=True)
    for step in range(3):
        for model, optimizer in ((ours, our_optimizer), (peer, their_optimizer)):
            forward(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    return whole_parameters(engine), plain_parameters(theirs)


def _skipping_blocks() -> list[Pair]:
    def forward(model: nn.Module, step: int) -> Tensor:
        return model(tower_rows(step), skip=_skips(step))

    def make() -> nn.Module:
        return Tower(num_blocks=NUM_BLOCKS)

    pairs = [_beside_ddp(make, stage, forward) for stage in STAGES]
    # The journal takes no offence: gathers and reductions are two orders.
    return [*pairs, _beside_ddp(make, 3, forward, journal=True)]


def test_ranks_that_skip_different_blocks_train_as_ddp_with_find_unused() -> None:
    for pairs in run_ranks(_skipping_blocks, 2):
        for ours, theirs in pairs:
            assert_same_values(ours, theirs, rtol=1e-5, atol=1e-7)


def _skipping_on_four() -> list[Pair]:
    def forward(model: nn.Module, step: int) -> Tensor:
        # Neighbours differ, and so do replicas.
        skip = _skips(step) if rank_here() < 2 else _skips(step + 2)
        return model(tower_rows(step), skip=skip)

    def make() -> nn.Module:
        return Tower(num_blocks=NUM_BLOCKS)

    return [_beside_ddp(make, 3, forward, dp_replicate=replicas) for replicas in (1, 2)]


def test_four_ranks_with_and_without_replicas_may_skip_blocks_too() -> None:
    for pairs in run_ranks(_skipping_on_four, 4):
        for ours, theirs in pairs:
            assert_same_values(ours, theirs, rtol=1e-5, atol=1e-7)


def _choosing_branches() -> list[Pair]:
    def forward(model: nn.Module, step: int) -> Tensor:
        # Rank 0 always takes a; rank 1 takes b in some blocks, in others b is unused by all.
        branches = "".join(
            "ab"[rank_here() and (block + step) % 3 == 0] for block in range(NUM_BLOCKS)
        )
        return model(tower_rows(step), branches)

    return [_beside_ddp(Chooser, stage, forward) for stage in STAGES]


def test_parameters_unused_on_one_rank_or_on_all_train_as_ddp_with_find_unused() -> None:
    untouched = Chooser()
    for pairs in run_ranks(_choosing_branches, 2):
        for ours, theirs in pairs:
            assert_same_values(ours, theirs, rtol=1e-5, atol=1e-7)
            # Weight decay would have moved it: plain PyTorch leaves a parameter without a gradient.
            assert torch.equal(ours["unused.weight"], untouched.unused.weight)
            assert torch.equal(ours["blocks.0.never.weight"], untouched.blocks[0].never.weight)


def _gradients_of_unused() -> list[Tensor | None]:
    found = []
    for stage in STAGES:
        model = Chooser()
        engine = Engine.attach(model, speed(stage))
        engine.bind_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        model(tower_rows(0), "a" * NUM_BLOCKS).backward()
        found += [engine.get_full_grad("unused.weight"), engine.get_full_grad("blocks.3.b.bias")]
        assert engine.get_full_grad("blocks.3.a.bias") is not None
    return found


def test_gradient_of_a_parameter_that_no_rank_used_is_none() -> None:
    for found in run_ranks(_gradients_of_unused, 2):
        assert found == [None] * 8


def _frozen() -> list[tuple[Pair, list[str]]]:
    results = []
    for stage in STAGES:

        def make() -> Tower:
            model = Tower()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("blocks.1" in name or "blocks.2.2" in name)
            return model

        ours, theirs = make(), make()
        engine = Engine.attach(ours, speed(stage))
        trained = [p for p in ours.parameters() if p.requires_grad]
        our_optimizer = torch.optim.AdamW(trained, lr=1e-2)
        engine.bind_optimizer(our_optimizer)
        their_optimizer = torch.optim.AdamW(
            [p for p in theirs.parameters() if p.requires_grad], lr=1e-2
        )
        peer = DistributedDataParallel(theirs)
        for step in range(3):
            for model, optimizer in ((ours, our_optimizer), (peer, their_optimizer)):
                model(tower_rows(step)).backward()
                optimizer.step()
                optimizer.zero_grad()
        trainable = [group.name for group in engine.parts.groups if group.trainable]
        results.append(((whole_parameters(engine), plain_parameters(theirs)), trainable))
    return results


def test_frozen_parameters_stay_and_the_others_train_as_in_ddp() -> None:
    start = plain_parameters(Tower())
    for results in run_ranks(_frozen, 2):
        for (ours, theirs), trainable in results:
            assert_same_values(ours, theirs, rtol=1e-5, atol=1e-7)
            assert torch.equal(ours["inlet.weight"], start["inlet.weight"])
            assert not torch.equal(ours["blocks.1.0.weight"], start["blocks.1.0.weight"])
            assert len(trainable) == 2
