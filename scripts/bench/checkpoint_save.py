"""Saving one and the same run: hf_speed against DeepSpeed ZeRO-3 and FSDP2 with DCP.

Claims (2 processes on CPU with one thread each; fp32 weights and AdamW, all 12 bytes a parameter):

- A synchronous save takes at most 0.8 times as long as that of the fastest peer when both end with
  everything on disk. DeepSpeed forces nothing to disk and DCP not the Hub model that it
  consolidates: the bench forces what they left, and counts it. Rows `as it returns` count only what
  the peer's own call does; ours is on disk all the same. Saves to memory (tmpfs) have no bar: there
  every system copies the same bytes into the kernel and waits for nothing.
- A save takes at most the memory of one file of the model and a tenth.
- A save beside the training keeps it for at most a tenth of our synchronous save.

`ratio` is ours over theirs; of seconds the median of the ratios within each round. Each peer has a
bar of its own, so the fastest one decides. Ours and DCP with `Hub model` leave a model that
`from_pretrained` loads; DeepSpeed and plain DCP leave shards (checkpoint_export.py has what making
a model of them costs). Ours hashes what it writes; the peers do not.

Before each save the disk's queue is empty and older saves are gone. Loads (no bar) begin without
any file in the page cache, and ours reads against checksums; each ends at the loss of the save.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from checkpoint_systems import MIB, SHARD_BYTES, SYSTEMS, Behind, Saved, evict
from common import Row, finish, interleave, make_row, parser, progress
from pipe_world import Task, World, worlds
from workload import Shape, describe

RANKS = 2
LLAMA_134M = Shape(16384, 1024, 2752, 8, 16, 1, 64)
LLAMA_13M = Shape(4096, 512, 1376, 3, 8, 1, 32)
MEMORY_DISK = Path("/dev/shm")


class Way(NamedTuple):
    """One way to save."""

    label: str
    system: str
    consolidate: bool | None = None


OURS = Way("hf_speed", "hf_speed")
PEERS = (
    Way("DeepSpeed ZeRO-3", "DeepSpeed"),
    Way("FSDP2 + DCP", "DCP", consolidate=False),
    Way("FSDP2 + DCP, Hub model", "DCP", consolidate=True),
)
BEHIND_PEER = PEERS[1]
"""Has a save beside the training."""


@contextmanager
def a_place(directory: Path) -> Iterator[str]:
    """A directory for one save, made where nothing waits to be written, and gone afterwards."""
    directory.mkdir(parents=True, exist_ok=True)
    place = tempfile.mkdtemp(prefix="save-", dir=directory)
    os.sync()
    try:
        yield place
    finally:
        shutil.rmtree(place)


def save(world: World, way: Way, directory: Path) -> Saved:
    """Save once; of each figure the largest of any rank."""
    if way.consolidate is not None:
        world.ask("consolidating", way.consolidate)
    with a_place(directory) as place:
        answers: list[Saved] = world.ask("save", place)
    return Saved(*(max(values) for values in zip(*answers, strict=True)))


def save_all(
    started: Mapping[str, World], ways: list[Way], directory: Path, *, rounds: int, name: str
) -> dict[str, list[Saved]]:
    """Save every way in turns, after one round that is not counted; by label."""
    found: dict[str, list[Saved]] = {way.label: [] for way in ways}

    def runner(way: Way) -> Callable[[], float]:
        def run() -> float:
            found[way.label].append(save(started[way.system], way, directory))
            return found[way.label][-1].durable_s

        return run

    runners = {way.label: runner(way) for way in ways}
    interleave(runners, rounds=rounds + 1, say=lambda text: progress(f"save to {name}, {text}"))
    for label, saves in found.items():
        first = saves.pop(0)
        saves[0] = saves[0]._replace(extra_bytes=max(first.extra_bytes, saves[0].extra_bytes))
        progress(
            f"{label} to {name}: {statistics.median(each.returned_s for each in saves):.2f} s, on "
            f"disk {statistics.median(each.durable_s for each in saves):.2f} s\n"
        )
    return found


def time_rows(
    found: Mapping[str, list[Saved]], name: str, shape: str, *, bar: str | None
) -> list[Row]:
    """Ours against each peer, as long as everything is on disk and as the peer returns."""
    mine = [each.durable_s for each in found[OURS.label]]
    rows = []
    for label in found:
        if label == OURS.label:
            continue
        for claim, theirs, judged in (
            ("both on disk", [each.durable_s for each in found[label]], bar),
            ("as it returns", [each.returned_s for each in found[label]], None),
        ):
            rows.append(
                make_row(
                    f"save to {name} vs {label}, {claim}",
                    shape,
                    ours=statistics.median(mine),
                    peer=label,
                    theirs=statistics.median(theirs),
                    unit="s",
                    ratios=[a / b for a, b in zip(mine, theirs, strict=True)],
                    bar=judged,
                )
            )
    return rows


def memory_rows(found: Mapping[str, list[Saved]], shape: str, shard_bytes: int) -> list[Row]:
    """The memory of a save: ours against a file of the model, the peers' without a bar."""
    peaks = {label: max(each.extra_bytes for each in saves) for label, saves in found.items()}
    mine = peaks[OURS.label]
    sides = [("one file of the model", shard_bytes, "<=1.1")]
    sides += [(label, peak, None) for label, peak in peaks.items() if label != OURS.label]
    return [
        make_row(
            f"memory that a save takes vs {label}",
            shape,
            ours=mine / MIB,
            peer=label,
            theirs=peak / MIB,
            unit="MiB",
            ratios=[mine / max(peak, 1)],
            bar=bar,
        )
        for label, peak, bar in sides
    ]


def slowest(answers: list[Behind]) -> Behind:
    """One save beside the training, of each figure the largest of any rank."""
    steps = [max(each) for each in zip(*(answer.steps_s for answer in answers), strict=True)]
    return Behind(
        max(answer.stall_s for answer in answers), max(answer.whole_s for answer in answers), steps
    )


def behind_rows(
    started: Mapping[str, World], ways: list[Way], directory: Path, sync_s: Mapping[str, float],
    shape: str, *, rounds: int,
) -> list[Row]:  # fmt: skip
    """Saves beside the training: how long they keep it, and what they cost the steps."""
    calm: dict[str, list[float]] = {way.label: [] for way in ways}
    busy: dict[str, list[Behind]] = {way.label: [] for way in ways}
    for index in range(rounds):
        for way in ways:
            progress(f"save beside the training, round {index + 1}/{rounds}: {way.label}")
            world = started[way.system]
            steps = [max(each) for each in zip(*world.ask("train", 3), strict=True)]
            calm[way.label].append(statistics.median(steps))
            with a_place(directory) as place:
                busy[way.label].append(slowest(world.ask("behind", place)))
    rows = []
    for way in ways:
        saves, step_s = busy[way.label], statistics.median(calm[way.label])
        stalls = [each.stall_s for each in saves]
        # All that the training lost: in the call, and in steps that took longer.
        costs = [each.whole_s - len(each.steps_s) * step_s for each in saves]
        during = [step for each in saves for step in each.steps_s] or [step_s]
        for claim, ours, theirs, bar in (
            ("training kept by", stalls, ("its synchronous save", sync_s[way.label]), "<=0.1"),
            ("training lost, in all, to", costs, ("its synchronous save", sync_s[way.label]), None),
            ("a step during", during, ("a step alone", step_s), None),
        ):
            rows.append(
                make_row(
                    f"{claim} a save beside it, {way.label}",
                    shape,
                    ours=statistics.median(ours),
                    peer=theirs[0],
                    theirs=theirs[1],
                    unit="s",
                    ratios=[each / theirs[1] for each in ours],
                    bar=bar if way is OURS else None,
                )
            )
    return rows


def load(world: World, way: Way, directory: Path) -> float:
    """Save, train on, load; give the load's seconds.

    Raises:
        RuntimeError: the loss after the load is not that of the save.
    """
    if way.consolidate is not None:
        world.ask("consolidating", way.consolidate)
    with a_place(directory) as place:
        before = world.ask("loss")
        world.ask("save", place)
        world.ask("train", 1)
        evict(place)
        seconds = max(world.ask("load", place))
        after = world.ask("loss")
    if before != after:
        raise RuntimeError(f"{way.label}: the loss was {before} at the save, {after} at the load")
    return seconds


def load_rows(
    started: Mapping[str, World], ways: list[Way], directory: Path, shape: str, *, rounds: int
) -> list[Row]:
    """Seconds to resume, ours against each peer."""
    runners = {
        way.label: functools.partial(load, started[way.system], way, directory) for way in ways
    }
    found = interleave(runners, rounds=rounds, say=lambda text: progress(f"load, {text}"))
    mine = found[OURS.label]
    return [
        make_row(
            f"load from disk vs {way.label}",
            shape,
            ours=statistics.median(mine),
            peer=way.label,
            theirs=statistics.median(found[way.label]),
            unit="s",
            ratios=[a / b for a, b in zip(mine, found[way.label], strict=True)],
            bar=None,
        )
        for way in ways
        if way is not OURS
    ]


def filesystem(directory: Path) -> str:
    """The type of the file system that a directory is on."""
    done = subprocess.run(
        ["df", "--output=fstype", str(directory)], capture_output=True, text=True, check=False
    )
    return done.stdout.split()[-1]


def measure(
    started: Mapping[str, World], ways: list[Way], args: argparse.Namespace, model: Shape
) -> list[Row]:
    """All rows of the systems that have started."""
    rounds = 2 if args.quick else 5
    shape = describe(model, "float32", RANKS)
    rows: list[Row] = []
    sync_s: dict[str, float] = {}
    for directory in (args.dir, MEMORY_DISK):
        name = filesystem(directory)
        home = Path(tempfile.mkdtemp(prefix="checkpoint_save-", dir=directory))
        try:
            found = save_all(started, ways, home, rounds=rounds, name=name)
            if OURS not in ways:
                continue
            bar = "<=0.8" if directory is args.dir else None
            rows += time_rows(found, name, shape, bar=bar)
            if directory is args.dir:
                shard = SHARD_BYTES
                rows += memory_rows(found, f"{shape}, files of {shard // MIB} MiB", shard)
                sync_s = {
                    label: statistics.median(each.durable_s for each in saves)
                    for label, saves in found.items()
                }
                beside = [way for way in ways if way in (OURS, BEHIND_PEER)]
                rows += behind_rows(started, beside, home, sync_s, shape, rounds=min(rounds - 1, 3))
                rows += load_rows(started, ways, home, shape, rounds=1 if args.quick else 2)
        finally:
            shutil.rmtree(home)
    return rows


def main() -> int:
    """Run the bench; see the module docstring."""
    made = parser(__doc__ or "", out="checkpoint_save")
    made.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR",
                      help="directory on the disk to be measured")  # fmt: skip
    args = made.parse_args()
    model = LLAMA_13M if args.quick else LLAMA_134M
    wanted = args.only.split(",") if args.only else list(SYSTEMS)
    ways = [way for way in (*PEERS, OURS) if way.system in wanted]
    tasks = [
        Task(name, RANKS, functools.partial(trainee, model, "float32"))
        for name, trainee in SYSTEMS.items()
        if name in wanted
    ]
    with worlds(tasks) as started:
        rows = measure(started, ways, args, model)
    return finish(rows, args, complete=not args.only)


if __name__ == "__main__":
    raise SystemExit(main())
