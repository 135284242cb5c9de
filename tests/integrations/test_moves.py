"""A checkpoint moves: to another mesh, stage, memory tier, precision, Trainer or loop.

Every place below trains two steps, saves and goes on. Others go on from there: the state that they
begin with is the same to the bit, and so is the loss of the next step, wherever the same ranks see
the same rows in whole layers; elsewhere it is the same sum in another order.
"""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

import hf_speed
from hf_speed.engine import Engine, engine_of
from tests.integrations.toys import curve, flat, llama, stage, trainer
from tests.support import run_ranks

STEPS = 2
"""Before the save, and after it."""

ROWS = 4
"""Of a global batch."""

DISK = dict.fromkeys(("optimizer", "gradients", "parameters"), "disk")
HOST = dict.fromkeys(("optimizer", "gradients"), "host")


class Place(NamedTuple):
    """Where a run is.

    Attributes:
        ranks: processes.
        config: how they share the work.
        bf16: whether they compute in it, with fp32 masters.
    """

    ranks: int
    config: dict[str, Any]
    bf16: bool = False

    @property
    def sharing(self) -> int:
        """Ranks of one batch."""
        mesh = self.config.get("mesh", {})
        return mesh.get("pp", 1) * mesh.get("tp", 1)

    @property
    def num_batches(self) -> int:
        """Different batches at a time."""
        return self.ranks // self.sharing


PLACES = {
    "one": Place(1, stage(0)),
    "one, disk": Place(1, stage(1, offload=DISK)),
    "one, bf16": Place(1, stage(2), bf16=True),
    "shard2": Place(2, stage(1)),
    "shard2, host": Place(2, stage(2, offload=HOST)),
    "shard2, disk": Place(2, stage(3, offload=DISK)),
    "shard2, bf16": Place(2, stage(3), bf16=True),
    "shard2, bf16, host": Place(2, stage(1, offload=HOST), bf16=True),
    "replicate2": Place(2, stage(3, mesh={"dp_replicate": 2})),
    "pp2": Place(2, stage(1, mesh={"pp": 2})),
    "tp2, disk": Place(2, stage(3, mesh={"tp": 2}, offload=DISK)),
    "hybrid4": Place(4, stage(3, mesh={"dp_replicate": 2, "dp_shard": 2})),
    "shard4, bf16, disk": Place(4, stage(2, offload=DISK), bf16=True),
    "pp2 tp2": Place(4, stage(0, mesh={"pp": 2, "tp": 2})),
    "pp2 shard2": Place(4, stage(3, mesh={"pp": 2})),
    "tp2 shard2, host": Place(4, stage(2, mesh={"tp": 2}, offload=HOST)),
}

MOVES = [
    # Where it was.
    ("shard2", "shard2"),
    ("pp2 tp2", "pp2 tp2"),
    ("shard2, disk", "shard2, disk"),
    ("shard2, bf16", "shard2, bf16"),
    # Other stages, tiers and placements of the same ranks.
    ("shard2", "shard2, disk"),
    ("shard2, disk", "replicate2"),
    ("replicate2", "shard2, host"),
    ("shard2, host", "shard2"),
    ("one", "one, disk"),
    ("shard2, bf16", "shard2, bf16, host"),
    # Other numbers of ranks.
    ("shard2, host", "one"),
    ("one, disk", "shard2, disk"),
    ("one", "hybrid4"),
    ("hybrid4", "shard2"),
    ("shard2, bf16, host", "one, bf16"),
    ("one, bf16", "shard4, bf16, disk"),
    ("shard4, bf16, disk", "shard2, bf16"),
    # Other axes.
    ("one", "pp2"),
    ("pp2", "replicate2"),
    ("shard2, disk", "pp2 tp2"),
    ("pp2 tp2", "one, disk"),
    ("tp2, disk", "pp2"),
    ("pp2", "tp2 shard2, host"),
    ("tp2 shard2, host", "pp2 shard2"),
    ("pp2 shard2", "tp2, disk"),
    ("hybrid4", "tp2 shard2, host"),
    ("pp2 shard2", "hybrid4"),
    # Other precisions.
    ("shard2", "shard2, bf16"),
    ("shard2, bf16, host", "pp2"),
    ("pp2 tp2", "shard4, bf16, disk"),
]


class Witness(transformers.TrainerCallback):
    """Takes the whole state after two steps: before the save, or after the load."""

    def __init__(self) -> None:
        self.states: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Something may have been loaded."""
        if state.global_step == STEPS:
            self.states = _states(engine_of(kwargs["model"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """The save is next."""
        if state.global_step == STEPS and not self.states:
            self.states = _states(engine_of(kwargs["model"]))


class Found(NamedTuple):
    """What a run has seen.

    Attributes:
        states: whole masters and moments between the second step and the third, on rank 0.
        curve: (steps, 2) losses and gradient norms from the third step on.
        draw: the next random number, after the run.
    """

    states: dict[str, Tensor]
    curve: Tensor
    draw: float


def _states(engine: Engine) -> dict[str, Tensor]:
    found = {name: value.float().clone() for name, value in engine.full_parameters(master=True)}
    for name in engine.parameter_names:
        for kind in ("exp_avg", "exp_avg_sq"):
            found[f"{name}/{kind}"] = engine.get_full_optimizer_state(name, kind)
    return found if dist.get_rank() == 0 else {}


def _leave(engine: Engine) -> None:
    """Close stores and groups. States need not be put together for a plain optimizer."""
    engine.optimizer.state.clear()
    engine.detach()


def _rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 96, (8,), generator=generator) for _ in range(6 * ROWS)]
    return [{"input_ids": each, "labels": each.clone()} for each in ids]


def _config(place: Place, scratch: str) -> dict[str, Any]:
    if "offload" not in place.config:
        return place.config
    offload = {"update": "fused", "paths": [scratch], **place.config["offload"]}
    return {**place.config, "offload": offload}


def _trained(directory: str, name: str, checkpoint: str | None) -> Found:
    """Through the Trainer."""
    place = PLACES[name]
    with tempfile.TemporaryDirectory() as scratch:
        made = trainer(
            directory,
            _config(place, scratch),
            model=llama(seed=0 if checkpoint is None else 7, tie_word_embeddings=True),
            per_device_train_batch_size=ROWS // place.num_batches,
            gradient_accumulation_steps=1,
            max_steps=2 * STEPS,
            train_sampling_strategy="sequential",
            save_strategy="no" if checkpoint else "steps",
            save_steps=STEPS,
            bf16=place.bf16,
        )
        made.train_dataset = _rows()
        witness = Witness()
        made.add_callback(witness)
        if checkpoint is None:
            # Ranks with random states of their own, all of which are saved.
            torch.rand(1 + 2 * dist.get_rank())
        made.train(resume_from_checkpoint=checkpoint)
        found = Found(witness.states, flat(curve(made))[-STEPS:], torch.rand(()).item())
        _leave(made.speed_engine)
    return found


def _looped(name: str, checkpoint: str) -> Found:
    """Through an Accelerator: the loss of the next step."""
    place = PLACES[name]
    with tempfile.TemporaryDirectory() as scratch:
        accelerator = hf_speed.Accelerator(
            hf_speed=_config(place, scratch), mixed_precision="bf16" if place.bf16 else "no"
        )
        model = llama(seed=7, tie_word_embeddings=True)
        # The Trainer's groups: matrices decay.
        groups = [
            {"params": [each for each in model.parameters() if (each.dim() > 1) == is_matrix]}
            for is_matrix in (True, False)
        ]
        optimizer = torch.optim.AdamW(groups, lr=7.0)
        loader = torch.utils.data.DataLoader(_rows(), batch_size=ROWS // place.num_batches)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        accelerator.load_state(checkpoint)
        states = _states(accelerator.engines[0])
        batch = next(iter(accelerator.skip_first_batches(loader, STEPS)))
        loss = model(**batch).loss
        accelerator.backward(loss)
        losses = accelerator.gather(loss.detach().reshape(1)).double()
        _leave(accelerator.engines[0])
        accelerator.free_memory()
    return Found(states, losses.mean().reshape(1, 1), 0.0)


def _departures(root: str) -> dict[str, Found]:
    here = [name for name, place in PLACES.items() if place.ranks == dist.get_world_size()]
    return {name: _trained(f"{root}/{name}", name, None) for name in here}


def _arrivals(root: str) -> dict[tuple[str, str], tuple[Found, Found]]:
    found = {}
    for source, name in MOVES:
        if PLACES[name].ranks == dist.get_world_size():
            checkpoint = f"{root}/{source}/checkpoint-{STEPS}"
            found[source, name] = (
                _trained(f"{root}/elsewhere", name, checkpoint),
                _looped(name, checkpoint),
            )
    return found


def _is_bitwise(source: Place, place: Place) -> bool:
    """Whether the same ranks see the same rows in whole layers."""
    same_rows = source.ranks == place.ranks and source.bf16 == place.bf16
    return same_rows and source.sharing == place.sharing == 1


def test_a_checkpoint_moves_between_all_meshes_tiers_and_precisions(tmp_path: Path) -> None:
    left: dict[str, list[Found]] = {}
    for world in (1, 2, 4):
        ranks = run_ranks(_departures, world, str(tmp_path))
        left |= {name: [each[name] for each in ranks] for name in ranks[0]}
    arrived = {}
    for world in (1, 2, 4):
        ranks = run_ranks(_arrivals, world, str(tmp_path))
        arrived |= {move: [each[move] for each in ranks] for move in ranks[0]}
    assert arrived.keys() == set(MOVES)
    for (source, name), ranks in arrived.items():
        before, place = left[source][0], PLACES[name]
        for found in ranks[0]:
            assert found.states.keys() == before.states.keys()
            for key, value in before.states.items():
                assert torch.equal(found.states[key], value), (source, name, key)
        trained, looped = ranks[0]
        bitwise = _is_bitwise(PLACES[source], place) or source == name
        narrow = place.bf16 or PLACES[source].bf16
        rtol = 0.0 if bitwise else 2**-8 if narrow else 1e-6
        where = f"{source} -> {name}"
        _check(trained.curve[:1, :1], before.curve[:1, :1], rtol, where)
        _check(looped.curve, before.curve[:1, :1], rtol or 1e-6, where)
        if source == name:
            _check(trained.curve, before.curve, 0.0, where)
        # A step later the moments have had their say.
        _check(trained.curve[:, 0], before.curve[:, 0], 2**-7 if narrow else 2e-5, where)
        if place.num_batches == 1:
            # Ranks of one batch go on with one random state.
            assert len({rank[0].draw for rank in ranks}) == 1, where


def _check(found: Tensor, expected: Tensor, rtol: float, where: str) -> None:
    torch.testing.assert_close(
        found, expected, rtol=rtol, atol=0.0, msg=lambda text: f"{where}: {text}"
    )


def test_the_moves_cover_every_place_both_ways() -> None:
    assert {source for source, _ in MOVES} >= PLACES.keys() - {"tp2 shard2, host"}
    assert {name for _, name in MOVES} == PLACES.keys()
