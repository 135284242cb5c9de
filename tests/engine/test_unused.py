"""Parameters that a step does not use, on one rank or on all, and blocks that ranks leave out."""

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_speed.engine import Engine
from tests.engine.toys import Tower, assert_same_values, rank_here, speed, tower_rows, whole_parameters
from tests.support import run_ranks

NUM_BLOCKS = 10
"""More than prefetched units and reductions in flight together: a wait for a rank that waits for
this one would show."""


def _skips(step: int) -> tuple[int, ...]:
    """Blocks that this rank leaves out: rank 0 the low ones first, rank 1 the high ones."""
    blocks = range(NUM_BLOCKS)
    by_rank = [blocks[step : step + 4], blocks[NUM_BLOCKS - 4 - step : NUM_BLOCKS - step]]
    return tuple(by_rank[rank_here()])


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _layer_drop_by_rank() -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    pairs = []
    for stage in (1, 2, 3):
        ours, theirs = Tower(num_blocks=NUM_BLOCKS), Tower(num_blocks=NUM_BLOCKS)
        engine = Engine.attach(ours, speed(stage, debug={"timeout_s": 20.0}))
        our_optimizer, their_optimizer = _sgd(ours), _sgd(theirs)
        engine.bind_optimizer(our_optimizer)
        peer = DistributedDataParallel(theirs, find_unused_parameters=True)
        for step in range(3):
            for model, optimizer in ((ours, our_optimizer), (peer, their_optimizer)):
                model(tower_rows(step), skip=_skips(step)).backward()
                optimizer.step()
                optimizer.zero_grad()
        pairs.append(
            (whole_parameters(engine), {n: p.detach() for n, p in theirs.named_parameters()})
        )
    return pairs


def test_ranks_that_skip_different_blocks_train_as_ddp_with_find_unused() -> None:
    for pairs in run_ranks(_layer_drop_by_rank, 2):
        for ours, theirs in pairs:
            assert_same_values(ours, theirs, rtol=1e-5, atol=1e-7)
