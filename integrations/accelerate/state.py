"""save_state and load_state: the engines' share of what accelerate does.

accelerate names the directory and saves schedulers, samplers, RNG and custom objects itself. For
the length of a call, optimizers that an engine steps are hidden from it (their state is in shards),
and one more hook, after the user's own, writes or reads the engines.

    engines (jobs of one save) -> accelerate's own files -> whole? -> `latest` -> total_limit

accelerate would remove older states before it writes the new one, and write a state over the one
that is in the same directory. `latest` is kept where it names states itself
(automatic_checkpoint_naming), in project_dir; elsewhere a state takes the place of an older one
when it is whole.
"""

import contextlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import accelerate
from torch import nn

from hf_speed.checkpoint.latest import Rotation, finish_checkpoint, newest_whole
from hf_speed.checkpoint.reader import read_manifest
from hf_speed.checkpoint.remote import mirror_of, upload
from hf_speed.checkpoint.replace import place_to_write, recover, swap
from hf_speed.checkpoint.staging import agreed
from hf_speed.checkpoint.stores import is_url
from hf_speed.engine import Engine, engine_of
from hf_speed.errors import CheckpointError, ConfigError
from hf_speed.integrations.accelerate.optimizer import SpeedOptimizer
from hf_speed.integrations.accelerate.scheduler import OwnRates
from hf_speed.integrations.remote import fetched, shared_scratch, started_world
from hf_speed.integrations.weights import full_dtype, load_model, restore_rng, write_model
from hf_speed.mesh import AxisGroup
from hf_speed.mesh.collectives import broadcast_object

_STATE = re.compile(r"checkpoint_(\d+)")
"""What accelerate calls the states that it names."""

_PART = re.compile(
    r"\.hf_speed.*|hf_speed|model_\d+|(model|adapter_model)(_\d+)?(-.*)?\.(safetensors|bin)(\.index\.json)?"
    r"|(generation_|adapter_)?config\.json|random_states_\d+\.pkl|custom_checkpoint_\d+\.pkl"
    r"|(optimizer|scheduler|sampler|dl_state_dict)(_\d+)?\.bin|scaler\.pt"
)
"""Names of what save_state writes."""


class StatefulAccelerator(accelerate.Accelerator):
    """The part of `Accelerator` that saves and loads."""

    state_weights: list[tuple[Engine, dict[str, Any]]] | None
    """While a state is saved: what get_state_dict gave for each engine, whole or {}."""

    @property
    def engines(self) -> list[Engine]:
        """The engines of the models prepared so far, in the order of prepare."""
        found = (engine_of(model) for model in self._models)
        return [engine for engine in found if engine is not None]

    def save_state(
        self,
        output_dir: str | None = None,
        safe_serialization: bool = True,  # noqa: FBT001, FBT002 - accelerate's signature
        **save_model_func_kwargs: Any,
    ) -> Any:
        """As accelerate's; each engine writes its shards in parallel. Collective.

        With checkpoint.asynchronous the state is whole after `wait_for_save()`; at an address, as
        in "s3://bucket/state", it is there on return, and passed by `project_dir` or the system's
        directory for temporary files, which all processes must share.
        """
        if isinstance(output_dir, str) and is_url(output_dir):
            if self.project_configuration.automatic_checkpoint_naming:
                raise ConfigError(
                    f"save_state({output_dir!r}) names an address, but with "
                    f"automatic_checkpoint_naming states are named in project_dir. Set "
                    f"checkpoint.mirror to have those copied, or turn the naming off."
                )
            with shared_scratch(self._project_root) as scratch:
                local = scratch / (PurePosixPath(output_dir).name or "state")
                self.save_state(str(local), safe_serialization, **save_model_func_kwargs)
                self.wait_for_save()
                upload(local, output_dir, world=started_world())
            return output_dir
        if not self.engines:
            return super().save_state(output_dir, safe_serialization, **save_model_func_kwargs)
        named = output_dir is None or self.project_configuration.automatic_checkpoint_naming
        place = None if named else _place(self, output_dir)
        with engines_save(self, place):
            written = output_dir if place is None else str(place.written)
            saved = super().save_state(written, safe_serialization, **save_model_func_kwargs)
        return saved if output_dir is None or place is None else Path(output_dir)

    def load_state(
        self,
        input_dir: str | None = None,
        load_kwargs: dict[str, Any] | None = None,
        **load_model_func_kwargs: Any,
    ) -> None:
        """As accelerate's; each engine reads its shards, of any world. Collective.

        Without `input_dir`: of the states that accelerate names, the newest that is whole. From an
        address: after a download, compared with the checksums of the save.
        """
        if isinstance(input_dir, str) and is_url(input_dir):
            with fetched(input_dir, self._project_root) as local:
                self.load_state(local, load_kwargs, **load_model_func_kwargs)
            return
        if not self.engines:
            super().load_state(input_dir, load_kwargs, **load_model_func_kwargs)
            return
        with engines_load(self):
            if input_dir is not None:
                _recover(self, input_dir)
            if input_dir is None and self.project_configuration.automatic_checkpoint_naming:
                input_dir = newest_state(self)
            super().load_state(input_dir, load_kwargs, **load_model_func_kwargs)

    @property
    def _project_root(self) -> Path | None:
        """What all processes share, if the user has named it."""
        root = self.project_configuration.project_dir
        return None if root is None else Path(root)

    def wait_for_save(self) -> None:
        """Block until the state is whole that save_state began to write. Collective.

        Raises:
            CheckpointError: on every rank; it could not be written.
        """
        for engine in self.engines:
            engine.saves.wait()

    def free_memory(self, *objects: Any) -> Any:
        """As accelerate's, after the save in flight."""
        self.wait_for_save()
        return super().free_memory(*objects)

    def end_training(self) -> None:
        """As accelerate's, after the save in flight."""
        self.wait_for_save()
        super().end_training()


def _directories(accelerator: StatefulAccelerator, root: str) -> list[tuple[Engine, str]]:
    """Where each engine's model goes: the directory itself, or one for each of several."""
    engines = [engine_of(model) for model in accelerator._models]
    alone = len(engines) == 1
    return [
        (engine, root if alone else f"{root}/model_{index}")
        for index, engine in enumerate(engines)
        if engine is not None
    ]


@contextlib.contextmanager
def _without_bound_optimizers(accelerator: StatefulAccelerator) -> Iterator[None]:
    everything = accelerator._optimizers
    accelerator._optimizers = [
        each
        for each in everything
        if not (isinstance(each, SpeedOptimizer) and each.engine is not None)
    ]
    try:
        yield
    finally:
        accelerator._optimizers = everything


class _Place(NamedTuple):
    """Where a state is to be, and where it is written until it is whole."""

    final: Path
    written: Path

    def take(self, group: AxisGroup) -> None:
        """Let what is written be where it is to be. Collective."""
        with agreed(group, f"Putting a state in the place of {self.final}"):
            if group.rank == 0 and self.written != self.final:
                swap(self.final, is_part=_is_part)


def _place(accelerator: StatefulAccelerator, output_dir: str) -> _Place:
    """Where a state of this name is written. Collective; waits for the save in flight."""
    accelerator.wait_for_save()
    _recover(accelerator, output_dir)
    final, mesh = Path(output_dir).resolve(), accelerator.engines[0].mesh
    written = final
    with agreed(mesh.world, f"Saving the state to {final}"):
        if mesh.rank == 0:
            written = place_to_write(final)
    return _Place(final, broadcast_object(written, group=mesh.world, device=mesh.device))


def _recover(accelerator: StatefulAccelerator, directory: str) -> None:
    """Complete what an earlier process began. Collective."""
    world, path = accelerator.engines[0].mesh.world, Path(directory).expanduser()
    with agreed(world, f"Completing the save to {path}"):
        if world.rank == 0:
            recover(path, is_part=_is_part)


def _is_part(name: str) -> bool:
    return _PART.fullmatch(name) is not None


@contextlib.contextmanager
def engines_save(accelerator: StatefulAccelerator, place: _Place | None) -> Iterator[None]:
    """While it lasts, accelerate's save_state also writes the engines. Collective.

    Older states go after it, when the new one is whole.

    Args:
        accelerator: that saves.
        place: of the state; None: accelerate names it.

    Raises:
        CheckpointError: on every rank; the save, or the one before, has failed.
    """
    engines = accelerator.engines
    for engine in engines:
        engine.saves.join(engines[0].saves)
    save = engines[0].saves.begin("Saving the state")
    saved: list[Path] = []
    accelerator.state_weights = []

    def hook(_models: list[nn.Module], weights: list[dict[str, Any]], directory: str) -> None:
        placeholders = {id(state): engine for engine, state in accelerator.state_weights or ()}
        # A hook of the user's that saved a model itself has taken its weights out of the list.
        unsaved = [placeholders[id(state)] for state in weights if id(state) in placeholders]
        weights[:] = [state for state in weights if id(state) not in placeholders]
        save.what = f"Saving the state to {directory}"
        saved.append(Path(directory))
        for engine, home in _directories(accelerator, directory):
            if any(each is engine for each in unsaved):
                write_model(engine, home, save=save)
            engine.save(home, save=save)

    project: Any = accelerator.project_configuration
    limit, project.total_limit = project.total_limit, None
    handle = accelerator.register_save_state_pre_hook(hook)
    try:
        with _without_bound_optimizers(accelerator), save.together():
            yield
    finally:
        handle.remove()
        project.total_limit = limit
        accelerator.state_weights = None
    name = None if place is None else place.final.name
    for directory in saved:
        save.submit(
            partial(
                finish_checkpoint,
                directory,
                root=Path(project.project_dir) if project.automatic_checkpoint_naming else None,
                world=save.group,
                require_whole=_Whole(accelerator),
                rotation=Rotation(
                    limit if project.automatic_checkpoint_naming else None,
                    (),
                    partial(_states_of, project.project_dir),
                ),
                mirror=mirror_of(engines[0].config, save.group, name=name),
            )
        )
    if place is not None:
        save.submit(partial(place.take, save.group))


class _Whole:
    """Raises for a directory that save_state has not written to the end."""

    def __init__(self, accelerator: StatefulAccelerator) -> None:
        """Of the models and objects that are registered now."""
        self._homes = [home for _, home in _directories(accelerator, ".")]
        self._num_objects = len(accelerator._custom_objects)

    def __call__(self, directory: Path) -> None:
        """See the class.

        Raises:
            CheckpointError: an engine's part is not whole, or a file of accelerate's is missing.
        """
        world_sizes = [read_manifest(directory / home).world_size for home in self._homes]
        files = [f"random_states_{rank}.pkl" for rank in range(max(world_sizes, default=0))]
        files += [f"custom_checkpoint_{index}.pkl" for index in range(self._num_objects)]
        for name in files:
            if not (directory / name).is_file():
                raise CheckpointError(
                    f"{directory / name} is missing: this save_state was cut short. Load an older "
                    f"state, or only the model of this one with from_pretrained."
                )


def newest_state(accelerator: StatefulAccelerator) -> str | None:
    """The state to go on from where accelerate names them; None where none is whole. Collective.

    The one that `latest` names, or else the newest that is whole, as the first rank sees them.
    """
    root, mesh = accelerator.project_configuration.project_dir, accelerator.engines[0].mesh
    found = None
    with agreed(mesh.world, f"Looking for the newest state in {root}"):
        if mesh.rank == 0:
            found = newest_whole(root, _states_of(root), require_whole=_Whole(accelerator))
    name = broadcast_object(found, group=mesh.world, device=mesh.device)
    return None if name is None else str(name)


def _states_of(project_dir: str) -> list[Path]:
    """The states that accelerate has named, oldest first."""
    home = Path(project_dir) / "checkpoints"
    numbered = {
        int(match[1]): path
        for path in (home.iterdir() if home.is_dir() else ())
        if path.is_dir() and (match := _STATE.fullmatch(path.name))
    }
    return [numbered[number] for number in sorted(numbered)]


@contextlib.contextmanager
def engines_load(accelerator: StatefulAccelerator) -> Iterator[None]:
    """While it lasts, accelerate's load_state also reads the engines. Collective.

    Raises:
        CheckpointError: on every rank; a save that was in flight has failed.
    """
    for engine in accelerator.engines:
        engine.saves.wait()
    read: list[tuple[Engine, str]] = []
    changed: list[Any] = []
    rates = OwnRates(accelerator._schedulers)

    def hook(models: list[nn.Module], directory: str) -> None:
        for engine, home in _directories(accelerator, directory):
            # A hook of the user's that loaded a model itself has taken it out of the list. The
            # masters are read all the same, and may lie in the model's files.
            is_ours = any(engine_of(model) is engine for model in models)
            if is_ours or full_dtype(home) is not None:
                load_model(engine, home)
            change = engine.load(home)
            if change is not None and change.has_own_rates:
                changed.append(engine.optimizer)
            read.append((engine, home))
        models[:] = [model for model in models if engine_of(model) is None]

    handle = accelerator.register_load_state_pre_hook(hook)
    try:
        with _without_bound_optimizers(accelerator):
            yield
        rates.restore(changed)
        for engine, home in read:
            restore_rng(engine, home)
    finally:
        handle.remove()
