"""Less common set-ups of the Trainer: replicas, streamed data, a search over hyperparameters."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers.integrations
import transformers.trainer
from torch.utils.data import IterableDataset
from transformers.hyperparameter_search import HyperParamSearchBackendBase
from transformers.trainer_utils import BestRun, HPSearchBackend

import hf_speed
from hf_speed.engine import engine_of
from tests.integrations.toys import arguments, curve, examples, flat, llama, stage, trainer
from tests.support import run_ranks


def _replicas(directory: str, configs: list[Any]) -> list[tuple[Any, float, int]]:
    found = []
    for config in configs:
        made = trainer(directory, config, per_device_train_batch_size=1)
        made.train()
        engine = engine_of(made.model)
        parts = 1 if engine is None else engine.mesh.axis("dp_shard").size
        found.append((curve(made), made.evaluate()["eval_loss"], parts))
    return found


def test_two_replicas_of_two_shards_train_as_four_ranks_of_ddp(tmp_path: Path) -> None:
    mesh = {"dp_replicate": 2}
    configs = [None, stage(1, mesh=mesh), stage(3, mesh=mesh)]
    ddp, *hybrid = run_ranks(_replicas, 4, str(tmp_path), configs)[0]
    for losses, evaluated, parts in hybrid:
        assert parts == 2
        torch.testing.assert_close(flat(losses), flat(ddp[0]), rtol=2e-6, atol=0)
        assert evaluated == pytest.approx(ddp[1], rel=1e-6)


class Stream(IterableDataset):
    """Rows that come one after another; how many is not told."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from examples(22)


def _streamed(directory: str, configs: list[Any], *, dispatch: bool | None) -> list[Any]:
    found = []
    for config in configs:
        options = {"accelerator_config": {"dispatch_batches": dispatch}, "max_steps": 7}
        made = hf_speed.Trainer(
            model=llama(),
            args=arguments(directory, config, **options),
            train_dataset=Stream(),
            eval_dataset=Stream(),
        )
        made.train()
        found.append((curve(made), made.evaluate()["eval_loss"]))
    return found


def _streams(directory: str, configs: list[Any]) -> list[Any]:
    # None: rank 0 reads and sends each rank its rows. False: every rank reads, and skips others'.
    return [_streamed(directory, configs, dispatch=each) for each in (None, False)]


def test_streamed_data_of_an_odd_length_trains_as_under_ddp(tmp_path: Path) -> None:
    for ddp, *stages in run_ranks(_streams, 2, str(tmp_path), [None, stage(2), stage(3)])[0]:
        assert len(ddp[0]) == 7
        for losses, evaluated in stages:
            torch.testing.assert_close(flat(losses), flat(ddp[0]), rtol=2e-6, atol=0)
            assert evaluated == pytest.approx(ddp[1], rel=1e-6)


class Trial(NamedTuple):
    """What the Trainer asks of one of optuna's."""

    number: int
    params: dict[str, Any]


TRIALS = (
    Trial(0, {"learning_rate": 1e-3}),
    Trial(1, {"learning_rate": 1e-2, "per_device_train_batch_size": 4}),
)


class GridSearch(HyperParamSearchBackendBase):
    """Tries all, as optuna's does under DDP: rank 0 forgets its model, the others do not."""

    name = "optuna"

    @staticmethod
    def is_available() -> bool:
        """Nothing to install."""
        return True

    def run(
        self,
        trainer: Any,
        n_trials: int,
        direction: str,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> BestRun:
        """Train and evaluate once a trial."""
        losses = []
        for index in range(n_trials):
            trainer.train(trial=TRIALS[index])
            losses.append(trainer.compute_objective(trainer.evaluate()))
            if dist.get_rank() == 0:
                trainer.model_wrapped = trainer.model = None
                trainer.accelerator.clear()
        best = min(range(n_trials), key=lambda index: losses[index])
        return BestRun(str(best), losses, TRIALS[best].params)


def _space(trial: Trial) -> dict[str, Any]:
    return trial.params


def _fresh() -> torch.nn.Module:
    return llama()


def _search(directory: str, config: Any) -> tuple[Any, Any]:
    made = hf_speed.Trainer(
        model_init=_fresh,
        args=arguments(directory, config),
        train_dataset=examples(),
        eval_dataset=examples(10, seed=2),
    )
    backends = {HPSearchBackend.OPTUNA: GridSearch}
    with (
        mock.patch.object(transformers.trainer, "ALL_HYPERPARAMETER_SEARCH_BACKENDS", backends),
        # What the log calls a trial; known for installed backends only.
        mock.patch.object(transformers.integrations, "hp_params", _space),
    ):
        best = made.hyperparameter_search(_space, backend="optuna", n_trials=len(TRIALS))
    return best.objective, best.hyperparameters


def _searches(directory: str, configs: list[Any]) -> list[Any]:
    return [_search(directory, config) for config in configs]


def test_hyperparameter_search_finds_what_it_finds_under_ddp(tmp_path: Path) -> None:
    ddp, *stages = run_ranks(_searches, 2, str(tmp_path), [None, stage(1), stage(3)])[0]
    assert ddp[1] == TRIALS[1].params
    for losses, best in stages:
        torch.testing.assert_close(flat(losses), flat(ddp[0]), rtol=2e-6, atol=0)
        assert best == ddp[1]
