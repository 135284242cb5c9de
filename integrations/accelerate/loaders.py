"""Data loaders where several ranks see one batch.

accelerate prepares them, told of data-parallel ranks instead of processes. Three things it takes
from the processes by itself:

    shuffling   where loaders are not divided (one data-parallel rank) each process draws alone
    iterables   rank 0 would read them and deal rows out to processes: here every rank reads all
                rows and keeps its batch's, and counts them, to know which fill up the last batch
    workers     the Trainer seeds them by the process: here by the batch
"""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.data_loader import IterableDatasetShard, prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import seed_worker

from hf_speed.errors import ConfigError
from hf_speed.integrations.accelerate.batches import BatchMesh


class LoaderOptions(NamedTuple):
    """What an Accelerator says of its loaders; see accelerate's DataLoaderConfiguration."""

    device: torch.device
    put_on_device: bool
    split_batches: bool
    dispatch_batches: bool | None
    even_batches: bool
    use_seedable_sampler: bool
    data_seed: int | None
    non_blocking: bool
    use_stateful_dataloader: bool
    rng_types: tuple[Any, ...]


def prepare_shared_loader(loader: DataLoader, options: LoaderOptions, batches: BatchMesh) -> Any:
    """A loader that gives the ranks of one batch the same rows, in the same order.

    Args:
        loader: the user's; left as it is.
        options: of the Accelerator.
        batches: who sees which.

    Raises:
        ConfigError: rows are to be dealt out to processes.
    """
    if options.dispatch_batches:
        raise ConfigError(
            f"dispatch_batches=True deals rows out to processes, but {batches.num_sharing} of them "
            f"share a batch (mesh.pp x mesh.tp). Leave it out: every rank reads the data set and "
            f"keeps the rows of its batch."
        )
    rng_types = list(options.rng_types)
    if batches.num_batches == 1:
        rng_types.append("torch")
    mine = copy.copy(loader)
    mine.worker_init_fn = _seeded_by_batch(loader.worker_init_fn, batches.index)
    if isinstance(loader.dataset, IterableDataset):
        # Not by setattr: torch lets a data set be set once.
        vars(mine)["dataset"] = CountedRows(loader.dataset)
    return prepare_data_loader(
        mine,
        options.device,
        num_processes=batches.num_batches,
        process_index=batches.index,
        split_batches=options.split_batches,
        put_on_device=options.put_on_device,
        rng_types=rng_types,
        dispatch_batches=False,
        even_batches=options.even_batches,
        use_seedable_sampler=options.use_seedable_sampler,
        data_seed=options.data_seed,
        non_blocking=options.non_blocking,
        use_stateful_dataloader=options.use_stateful_dataloader,
    )


class CountedRows(IterableDataset):
    """The rows of an iterable data set, counted.

    Args:
        dataset: the user's, whose other attributes can be read here too.

    Attributes:
        num_rows: of the pass so far.
    """

    def __init__(self, dataset: IterableDataset) -> None:
        self.dataset = dataset
        self.num_rows = 0

    def __iter__(self) -> Iterator[Any]:
        """One pass."""
        self.num_rows = 0
        for row in self.dataset:
            self.num_rows += 1
            yield row

    def __len__(self) -> int:
        """Of the data set, if it has a length."""
        return len(self.dataset)  # pyrefly: ignore[bad-argument-type]

    def __getattr__(self, name: str) -> Any:
        """Epochs and generators are the data set's business."""
        if name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


def num_last_rows(loader: Any, remainder: int) -> int | None:
    """Rows of the last batches of a loader, all ranks' together, that fill up nothing.

    Args:
        loader: at its end.
        remainder: what accelerate knows; -1 is nothing, 0 that all rows are true ones.

    Returns:
        None: all of them, as far as is known.
    """
    shard = getattr(loader, "dataset", None)
    if isinstance(shard, IterableDatasetShard) and isinstance(shard.dataset, CountedRows):
        split = shard.split_batches
        rows = shard.batch_size if split else shard.batch_size * shard.num_processes
        # 0 where workers, which are processes of their own, have counted.
        remainder = shard.dataset.num_rows % rows
    return remainder if remainder > 0 else None


def _seeded_by_batch(init: Any, index: int) -> Any:
    if isinstance(init, partial) and init.func is seed_worker and "rank" in init.keywords:
        return partial(seed_worker, *init.args, **{**init.keywords, "rank": index})
    return init
