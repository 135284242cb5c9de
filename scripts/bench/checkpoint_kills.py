"""A run that is killed in the middle of a save, again and again, loses at most that save.

Every trial goes on from what the trials before have left: it resumes, trains, and is killed by
SIGKILL on all ranks while it saves, at a moment that is uniform over the time of a save. The next
trial says what it resumed: the step, and a checksum of parameters, masters, moments and counters.

Claims, each of all trials: the next one resumed; at no older step than that of the save that was
complete when the signal was sent; with the bits of an undisturbed run at that step (`ratio` is the
share of the trials). Beside them, how many kills fell into a save, and what transformers' own
Trainer leaves under the same kills; where it cannot resume, its newest checkpoint is taken away, as
its user would.

`save_total_limit` is 2 and checkpoints are tiny, so the moments between files are most of a save.
A rank is forked from a process that has imported everything.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from common import Row, finish, make_row, parser, progress
from torch import Tensor

import hf_speed
from hf_speed.integrations.transformers.hub import plan_hub_model

WORDS, ROWS, COLUMNS = 61, 24, 6
TIMEOUT_S = 60.0
SLACK = 1.2
"""Kills go a little beyond the usual time of a save, which varies."""


class System(NamedTuple):
    """Who saves, and how."""

    name: str
    ranks: int
    config: dict[str, Any] | None
    """Of hf_speed; None: transformers' own Trainer."""


def systems() -> list[System]:
    """Everything that is killed."""
    behind = {"checkpoint": {"asynchronous": True}}
    return [
        System("at once", 1, {"zero": {"stage": 1}}),
        System("behind the training", 1, {"zero": {"stage": 3}, **behind}),
        System("at once", 2, {"zero": {"stage": 3}}),
        System("behind the training", 2, {"zero": {"stage": 1}, **behind}),
        System("transformers", 1, None),
    ]


class Outcome(NamedTuple):
    """What a trial left.

    Attributes:
        resumed: whether the next run could go on.
        complete: step of the save that was complete when the signal was sent.
        step: that the next run went on from; -1: it could not.
        exact: whether it had the bits of that step.
        within: whether the signal fell into a save.
    """

    resumed: bool
    complete: int
    step: int
    exact: bool
    within: bool


# ---- a run ----


def _model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _examples() -> list[dict[str, Tensor]]:
    words = torch.randint(1, WORDS, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in words]


class _Teller(transformers.TrainerCallback):
    """Says at the first step what was resumed, or after every step what is there."""

    def __init__(self, tell: Callable[[dict[str, Any]], None], *, always: bool) -> None:
        self.trainer: Any = None
        self._tell = tell
        self._always = always
        self._told = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if not self._told and not self._always:
            self._told = True
            self._tell({"step": state.global_step, "digest": digest_of(self.trainer)})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if self._always:
            self._tell({"step": state.global_step, "digest": digest_of(self.trainer)})


def digest_of(trainer: Any) -> str:
    """A checksum of all that the optimizer updates; collective."""
    found = hashlib.sha256()
    engine = hf_speed.engine_of(trainer.model)
    optimizer = trainer.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    if engine is None:
        for parameter in trainer.model.parameters():
            found.update(parameter.detach().numpy().tobytes())
            for key, value in sorted(inner.state.get(parameter, {}).items()):
                found.update(f"{key}{value.sum().item()}".encode())
                found.update(value.numpy().tobytes())
        return found.hexdigest()
    for name, value in engine.full_parameters(master=True):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    pieces = [piece for group in engine.parts.groups for piece in group.pieces]
    counters = {float(inner.state[piece]["step"]) for piece in pieces if inner.state.get(piece)}
    found.update(str(sorted(counters)).encode())
    for name in engine.parameter_names if counters else ():
        for key in ("exp_avg", "exp_avg_sq"):
            found.update(engine.get_full_optimizer_state(name, key).contiguous().numpy().tobytes())
    return found.hexdigest()


def _trainer(system: System, directory: str, tell: Callable[..., None], **options: Any) -> Any:
    base: Any = transformers.Trainer if system.config is None else hf_speed.Trainer

    class Killed(base):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            tell({"saving": self.state.global_step})
            super()._save_checkpoint(*args, **kwargs)

    always = options.pop("always", False)
    common = {
        "per_device_train_batch_size": 4 // system.ranks, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, "logging_strategy": "no", "save_total_limit": 2, "max_steps": 100_000,
        "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    kind = transformers.TrainingArguments if system.config is None else hf_speed.TrainingArguments
    more = {} if system.config is None else {"hf_speed": system.config}
    teller = _Teller(tell, always=always)
    made = Killed(
        model=_model(),
        args=kind(directory, **(common | options), **more),
        train_dataset=_examples(),
        callbacks=[teller],
    )
    made.remove_callback(transformers.PrinterCallback)
    teller.trainer = made
    return made


def _resume_and_save(system: System, directory: str, tell: Callable[..., None]) -> None:
    has_one = any(Path(directory).glob("checkpoint-*"))
    made = _trainer(system, directory, tell)
    made.train(resume_from_checkpoint=True if has_one else None)


def _train_undisturbed(steps: int) -> Callable[[System, str, Callable[..., None]], None]:
    def run(system: System, directory: str, tell: Callable[..., None]) -> None:
        options = {"max_steps": steps, "save_strategy": "no", "always": True}
        _trainer(system, directory, tell, **options).train()

    return run


def _name_modules(system: System, directory: str, tell: Callable[..., None]) -> None:
    _trainer(system, directory, tell, max_steps=2).train()
    tell({"modules": sorted(sys.modules)})


def warm(directory: Path) -> None:
    """Import here what a run imports, so that a fork has it."""
    for system in systems():
        if system.ranks == 1:
            ranks = Ranks(system, str(directory / f"warm {system.name}"), _name_modules)
            told = ranks.told("modules")
            ranks.close()
            for name in told["modules"] if told else ():
                # Some are parts of others, made by them.
                with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
                    importlib.import_module(name)


def prepare() -> None:
    """Do once what every fork would do: transformers' table of layouts, and looking for garbage."""
    plan_hub_model(_model())
    gc.collect()
    gc.freeze()


# ---- ranks, forked ----


class Ranks:
    """The processes of one run; what rank 0 tells comes through a pipe."""

    def __init__(self, system: System, directory: str, run: Callable[..., None]) -> None:
        self._store = tempfile.TemporaryDirectory(prefix="kills-")
        receive, send = os.pipe()
        self.pids = []
        self.error = "it has ended"
        for rank in range(system.ranks):
            pid = os.fork()
            if pid == 0:
                os.close(receive)
                _child(system, rank, directory, run, send if rank == 0 else None, self._store.name)
            self.pids.append(pid)
        os.close(send)
        self._pipe = os.fdopen(receive)

    def told(self, key: str) -> dict[str, Any] | None:
        """The next message with `key`; None: the run has ended."""
        for line in self._pipe:
            message = json.loads(line)
            self.error = message.get("error", self.error)
            if key in message:
                return message
        return None

    def kill(self) -> None:
        """SIGKILL to all."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Wait for the processes to be gone."""
        self._pipe.close()
        for pid in self.pids:
            os.waitpid(pid, 0)
        self._store.cleanup()


def _child(
    system: System,
    rank: int,
    directory: str,
    run: Callable[..., None],
    send: int | None,
    store: str,
) -> None:
    """One rank; never returns."""
    code = 1
    try:
        os.environ["ACCELERATE_USE_CPU"] = "1"
        names = {"RANK": rank, "LOCAL_RANK": rank}
        names |= {"WORLD_SIZE": system.ranks, "LOCAL_WORLD_SIZE": system.ranks}
        for name, value in names.items():
            os.environ.pop(name, None)
            if system.ranks > 1:
                os.environ[name] = str(value)
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - ends with the process
        if system.ranks > 1:
            shared = dist.FileStore(f"{store}/ranks", system.ranks)
            dist.init_process_group(
                "gloo", store=shared, rank=rank, world_size=system.ranks,
                timeout=timedelta(seconds=TIMEOUT_S),
            )  # fmt: skip

        def tell(message: dict[str, Any]) -> None:
            if send is not None:
                os.write(send, (json.dumps(message) + "\n").encode())

        run(system, directory, tell)
        code = 0
    except BaseException as error:  # noqa: BLE001 - told to the parent, which judges
        if send is not None:
            os.write(send, (json.dumps({"error": repr(error)[:500]}) + "\n").encode())
    finally:
        os._exit(code)


# ---- trials ----


def complete_step(directory: Path, system: System) -> int:
    """Of the last save that is complete; 0 where none is."""
    if system.config is not None:
        with contextlib.suppress(OSError):
            return int((directory / "latest").read_text().rpartition("-")[2])
        return 0
    # transformers writes this file last.
    states = directory.glob("checkpoint-*/trainer_state.json")
    return max((int(path.parent.name.rpartition("-")[2]) for path in states), default=0)


def save_time_s(system: System, directory: Path, num_saves: int) -> float:
    """How long a save takes from its beginning until it is complete; leaves some."""
    ranks = Ranks(system, str(directory), _resume_and_save)
    times = []
    for _ in range(num_saves):
        saving = ranks.told("saving")
        begin = time.perf_counter()
        if saving is None:
            raise RuntimeError(f"{system} does not save: {ranks.error}")
        while complete_step(directory, system) < saving["saving"]:
            time.sleep(0.0005)
        times.append(time.perf_counter() - begin)
    ranks.kill()
    ranks.close()
    return statistics.median(times[1:])


def reference(system: System, directory: Path, steps: int) -> dict[int, str]:
    """The checksum of every step of an undisturbed run."""
    ranks = Ranks(system, str(directory / "reference"), _train_undisturbed(steps))
    found: dict[int, str] = {}
    while (told := ranks.told("digest")) is not None:
        found[told["step"]] = told["digest"]
    ranks.close()
    return found


def run_trials(
    system: System,
    directory: Path,
    num_trials: int,
    *,
    seed: int = 0,
    num_timed: int = 8,
    say: Callable[[str], None],
) -> list[Outcome]:
    """Kill, resume, and compare, `num_trials` times, after `num_timed` saves that are timed."""
    home = directory / "run"
    usual_s = save_time_s(system, home, num_timed)
    chance = random.Random(seed)
    pending: tuple[int, bool] = (complete_step(home, system), False)
    killed: list[tuple[int, bool, int, str]] = []
    while len(killed) <= num_trials:
        ranks = Ranks(system, str(home), _resume_and_save)
        resumed = ranks.told("digest")
        saving = None if resumed is None else ranks.told("saving")
        complete, within = pending
        killed.append(
            (complete, within, -1, "") if saving is None or resumed is None
            else (complete, within, resumed["step"], resumed["digest"])
        )  # fmt: skip
        if saving is not None:
            time.sleep(chance.random() * usual_s * SLACK)
            complete = complete_step(home, system)
            ranks.kill()
            pending = (complete, complete < saving["saving"])
        ranks.close()
        if saving is None:
            # As a user would: the newest does not load, so try the one before.
            _take_newest_away(home)
            pending = (complete_step(home, system), False)
        say(f"{system.name}, {system.ranks} ranks: {len(killed) - 1} of {num_trials} kills")
    expected = reference(system, directory, max(step for _, _, step, _ in killed) + 1)
    # The first went on from the saves that were timed, which were killed too.
    return [
        Outcome(step >= 0, complete, step, expected.get(step) == digest, within)
        for complete, within, step, digest in killed[1:]
    ]


def _take_newest_away(home: Path) -> None:
    found = sorted(home.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    if found:
        found[-1].rename(home / f"lost-{found[-1].name}-{time.monotonic_ns()}")


def rows_of(system: System, outcomes: list[Outcome]) -> list[Row]:
    """The claims of one system."""
    num = len(outcomes)
    bar = None if system.config is None else ">=1"
    who = "transformers' Trainer" if system.config is None else f"saves {system.name}"
    counts = {
        "resumable after a kill": sum(each.resumed for each in outcomes),
        "not older than the last complete save": sum(e.step >= e.complete for e in outcomes),
        "bit for bit of their step": sum(each.exact for each in outcomes),
    }
    shape = f"tiny Llama, {system.ranks} rank{'s' if system.ranks > 1 else ''}, Trainer"
    rows = [
        make_row(
            f"{claim}: {who}, {system.ranks}", shape, ours=count, peer="kills", theirs=num,
            unit="runs", ratios=[count / num], bar=bar,
        )
        for claim, count in counts.items()
    ]  # fmt: skip
    inside = sum(each.within for each in outcomes)
    rows.append(
        make_row(
            f"kills within a save: {who}, {system.ranks}", shape, ours=inside, peer="kills",
            theirs=num, unit="runs", ratios=[inside / num],
            bar=None if system.config is None else ">=0.5",
        )
    )  # fmt: skip
    return rows


def main() -> int:
    """Run the bench; see the module docstring."""
    args = parser(__doc__ or "", out="checkpoint_kills").parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    rows: list[Row] = []
    wanted = args.only.split(",") if args.only else []
    with tempfile.TemporaryDirectory(prefix="kills-") as directory:
        warm(Path(directory))
    prepare()
    for system in systems():
        if wanted and system.name not in wanted:
            continue
        num_trials = 8 if args.quick else (200 if system.ranks == 1 else 60)
        with tempfile.TemporaryDirectory(prefix="kills-") as directory:
            outcomes = run_trials(system, Path(directory), num_trials, say=progress)
        rows += rows_of(system, outcomes)
    return finish(rows, args, complete=not wanted)


if __name__ == "__main__":
    raise SystemExit(main())
