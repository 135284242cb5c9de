"""One run: a model taken over in place, and the verbs that a training loop needs.

engine = Engine.attach(model, config)     # collective; the model stays the user's object
engine.bind_optimizer(optimizer)          # any time before its first step
engine.backward(model(**batch).loss)
engine.clip_grad_norm_(1.0)
optimizer.step(); optimizer.zero_grad()
engine.save(directory); engine.load(directory)
engine.detach()                           # plain model and optimizer again
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_speed.checkpoint.saver import Save
from hf_speed.config import ResolvedConfig, SpeedConfig
from hf_speed.engine.access import Access, fill_group
from hf_speed.engine.assemble import Callbacks, Parts, assemble
from hf_speed.engine.binding import OptimizerBinding
from hf_speed.engine.clearing import unwrap_zero_grad, wrap_zero_grad
from hf_speed.engine.division import SlicePlanner, SliceReader
from hf_speed.engine.generation import unwrap_generate, wrap_generate
from hf_speed.engine.link import attach_link, engine_of, remove_link
from hf_speed.engine.parking import ParkedStates
from hf_speed.engine.pipeline import PipelineForward
from hf_speed.engine.report import peak_bytes
from hf_speed.engine.rng import share_rng
from hf_speed.engine.saves import Saves
from hf_speed.engine.stages import install_pipeline
from hf_speed.engine.state import load_engine, save_engine
from hf_speed.engine.structure import (
    allow_parts,
    has_new_structure,
    left_together,
    new_structure,
    refuse_parts,
    replacements,
    resizings,
)
from hf_speed.errors import EngineError
from hf_speed.mesh import ParallelMesh
from hf_speed.optim.families import OptimizerChange


class StepStats(NamedTuple):
    """What a step cost and where it stands.

    Attributes:
        grad_norm: global norm before clipping, of the last step that was clipped.
        loss_scale: 1.0 unless fp16 computes.
        bytes_sent: by this rank to others since the engine was attached.
        peak_bytes: highest use of each memory tier by this process.
    """

    grad_norm: float | None
    loss_scale: float
    bytes_sent: int
    peak_bytes: dict[str, int]


class Engine:
    """ZeRO stages 0 to 3 over one model. Make one with `attach`."""

    def __init__(
        self,
        model: nn.Module,
        config: SpeedConfig,
        *,
        compute_dtype: torch.dtype | None,
        device: torch.device,
        slice_planner: SlicePlanner | None,
    ) -> None:
        self.model = model
        self.sync_gradients = True
        self.notes: dict[str, Any] = {}
        """What the caller wants a checkpoint to say of the run, as JSON: its data, for example."""
        self._config = config
        self._compute_dtype = compute_dtype
        self._device = device
        self._binding: OptimizerBinding | None = None
        self._gathered_depth = 0
        self._parked: ParkedStates | None = None
        self._slice_planner = slice_planner
        self._take_over()

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        config: SpeedConfig,
        *,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        slice_planner: SlicePlanner | None = None,
    ) -> "Engine":
        """Take `model` over, in place. Collective over all started processes.

        Args:
            model: any module of plain parameters; those on the meta device get memory for this
                rank's part and no values (see load_parameters).
            config: what to shard and how.
            compute_dtype: working parameters are cast to it, except those of modules that the model
                keeps in fp32; None leaves every parameter its own dtype.
            device: where parts live; None: where the model is, or the current accelerator for a
                model on the meta device.
            slice_planner: says how the layers of a model are divided, where mesh.tp is above 1.

        Raises:
            ConfigError: the config cannot take effect here.
            MeshError: the mesh is not the size of the world.
            EngineError: the model has an engine already.
        """
        if engine_of(model) is not None:
            raise EngineError(
                f"This {type(model).__name__} has an engine already. Call its detach() first."
            )
        chosen = device if device is not None else _device_of(model)
        return cls(
            model,
            config,
            compute_dtype=compute_dtype,
            device=chosen,
            slice_planner=slice_planner,
        )

    def _take_over(self) -> None:
        callbacks = Callbacks(
            # Under a pipeline a step has many backwards; their sum is reduced once, afterwards.
            is_syncing=lambda: self.sync_gradients and self._pipeline is None,
            on_forward=self._before_forward,
            on_backward_end=self._on_backward_end,
        )
        self._pipeline: PipelineForward | None = None
        self._parts: Parts = assemble(
            self.model,
            self._config,
            compute_dtype=self._compute_dtype,
            device=self._device,
            callbacks=callbacks,
            slice_planner=self._slice_planner,
        )
        self._pipeline = install_pipeline(self)
        self._access = Access(self._parts, self.model)
        self.saves = Saves(self._parts)
        pieces = (piece for group in self._parts.groups for piece in group.pieces)
        wrap_zero_grad(self.model, pieces)
        self._link = attach_link(self.model, self)
        self._generating = (
            wrap_generate(
                self.model,
                self.gathered,
                self.config.generate if self.is_sharded else "resident",
                share_rng=lambda: share_rng(self.mesh),
            )
            if self.is_sharded or self._parts.division.is_divided
            else []
        )
        if self._parts.division.is_divided:
            refuse_parts(self.model, self.mesh)
            # The dropout that ranks of one batch repeat has to agree.
            share_rng(self.mesh)

    @property
    def config(self) -> ResolvedConfig:
        """The config with nothing left open."""
        return self._parts.config

    @property
    def given_config(self) -> SpeedConfig:
        """The config as it came."""
        return self._config

    @property
    def mesh(self) -> ParallelMesh:
        """Who talks to whom."""
        return self._parts.mesh

    @property
    def parts(self) -> Parts:
        """What the engine is made of, for the rooms that save and report."""
        return self._parts

    @property
    def is_sharded(self) -> bool:
        """Whether values are away, on other ranks or another tier, while no module computes."""
        return any(group.is_sharded for group in self._parts.groups)

    @property
    def optimizer(self) -> Optimizer | None:
        """The user's optimizer, once bound."""
        return None if self._binding is None else self._binding.optimizer

    @property
    def parameter_names(self) -> list[str]:
        """Every parameter once, tied ones by their first name."""
        return self._access.names

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last optimizer step was left out because some rank's gradients overflowed."""
        return self._parts.stepper.was_skipped

    @property
    def loss_scale(self) -> float:
        """The factor on the loss in fp16; 1.0 elsewhere."""
        return 1.0 if self._parts.scaler is None else self._parts.scaler.scale

    def bind_optimizer(self, optimizer: Optimizer) -> None:
        """Let `optimizer` update this rank's pieces: its param_groups are re-pointed in place.

        Raises:
            ConfigError: it needs whole tensors and the stage shards them.
            EngineError: another optimizer is bound.
        """
        if self._binding is not None:
            if self._binding.optimizer is optimizer:
                return
            # A second train() brings a new optimizer; the old one gets its parameters back.
            self._binding.release()
        self._binding = OptimizerBinding(optimizer, self._parts, before_step=self.saves.check)

    def release_optimizer(self) -> None:
        """Give a bound optimizer its whole parameters back. Collective."""
        if self._binding is not None:
            self._parts.stepper.settle()
            self._binding.release()
            self._binding = None

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """loss.backward(), scaled in fp16."""
        scaled = loss if self._parts.scaler is None else loss * self.loss_scale
        scaled.backward(**kwargs)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the global gradient norm; returns the norm before, 0-d fp32. Collective."""
        return self._parts.stepper.clip_norm(float(max_norm), float(norm_type))

    def clip_grad_value_(self, value: float) -> None:
        """Clamp every gradient element to [-value, value]. Collective."""
        self._parts.stepper.clip_value(float(value))

    @contextmanager
    def gathered(
        self, names: Sequence[str] | None = None, *, modify: bool = False
    ) -> Iterator[None]:
        """Whole parameters inside, wherever their parts live. Collective.

        Args:
            names: the parameters to hold, or None for all; others of their units come along. Each
                rank sees its part of a model that is spread over stages or slices.
            modify: keep changes. Rank 0's values count. Inside, modules may be replaced or resized
                (with names=None): the engine takes the model over anew on leaving.

        Raises:
            EngineError: other modules where each rank has a part of the model only.
        """
        self._parts.stepper.settle()
        self.saves.secure(when=modify)
        divided, what = self._parts.division.is_divided, "A scope of gathered(modify=True)"
        together = left_together(self.mesh, what) if modify and divided else nullcontext()
        replaced: list[tuple[nn.Parameter, nn.Parameter]] | None = None
        resized: list[tuple[nn.Parameter, Tensor]] = []
        self._gathered_depth += 1
        try:
            with self._access.gathered(names, modify=modify), together:
                yield
                if modify and has_new_structure(self._parts, self.model):
                    if divided:
                        raise new_structure(self.mesh, f"{what} has replaced or frozen parameters")
                    if self._gathered_depth > 1:
                        raise EngineError(
                            "A model was resized in a gathered() inside another. Resize it in the "
                            "outermost one, with modify=True."
                        )
                    replaced, resized = (
                        replacements(self._parts, self.model),
                        resizings(self._parts),
                    )
        finally:
            self._gathered_depth -= 1
        if replaced is not None:
            self._rebuild(replaced, resized)

    def _rebuild(
        self,
        replaced: Sequence[tuple[nn.Parameter, nn.Parameter]],
        resized: Sequence[tuple[nn.Parameter, Tensor]],
    ) -> None:
        """Take a model of another structure over: back to plain, then attach again."""
        optimizer = self.optimizer
        scale = None if self._parts.scaler is None else self._parts.scaler.state()
        self.detach()
        # What was made inside has the dtype that computes; the parameters have their own again.
        for parameter, values in resized:
            parameter.data = values.to(parameter.dtype)
        for old, new in replaced:
            new.data = new.data.to(old.dtype)
        if optimizer is not None:
            new_of = {id(old): new for old, new in replaced}
            for group in optimizer.param_groups:
                group["params"][:] = [new_of.get(id(each), each) for each in group["params"]]
            for old, _ in (*replaced, *resized):
                optimizer.state.pop(old, None)
        self._take_over()
        if self._parts.scaler is not None and scale is not None:
            self._parts.scaler.load(scale)
        if optimizer is not None:
            self.bind_optimizer(optimizer)

    def full_parameters(
        self, names: Sequence[str] | None = None, *, master: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters in model order, one unit in memory at a time. Collective.

        Every rank iterates to the end. A value is valid until the next one is asked for.

        Args:
            names: which; None is all.
            master: in the precision that the optimizer updates, where that is higher.
        """
        self._parts.stepper.settle()
        return self._access.full_parameters(names, master=master)

    def load_parameters(self, read: SliceReader) -> None:
        """Fill parameters, masters included, from slices. Each rank reads only what it holds.

        At stages 0 to 2 every rank reads every parameter whole. No collective.
        """
        self._parts.stepper.settle()
        self.saves.secure()
        local = self._parts.division.local_reader(read)
        for group in self._parts.groups:
            with group.in_memory(modify=True):
                fill_group(group, local)
        self._parts.gatherer.invalidate()

    def load_full_parameters(self, source: Callable[[str], Tensor | None]) -> None:
        """Fill parameters from whole tensors; `source` returns None to keep one. No collective."""

        def read(name: str, start: int, numel: int) -> Tensor | None:
            value = source(name)
            return None if value is None else value.reshape(-1)[start : start + numel]

        self.load_parameters(read)

    def get_full_parameter(self, name: str) -> Tensor:
        """A copy of one whole parameter, in master precision. Collective."""
        self._parts.stepper.settle()
        return self._access.parameter(name)

    def set_full_parameter(self, name: str, value: Tensor) -> None:
        """Overwrite one parameter with the same value on every rank."""
        self._parts.stepper.settle()
        self.saves.secure()
        self._access.set_parameter(name, value)

    def get_full_grad(self, name: str) -> Tensor | None:
        """A copy of one whole gradient: the mean over ranks, unscaled. Collective."""
        return self._access.gradient(name)

    def set_full_grad(self, name: str, value: Tensor) -> None:
        """Overwrite one whole gradient, between the backward and the step. Collective."""
        self._access.set_gradient(name, value)

    def get_full_optimizer_state(self, name: str, key: str) -> Tensor:
        """A copy of one whole optimizer state, for example key="exp_avg". Collective."""
        self._parts.stepper.settle()
        return self._access.optimizer_state(name, key, self._require_optimizer())

    def set_full_optimizer_state(self, name: str, key: str, value: Tensor) -> None:
        """Overwrite one whole optimizer state with the same value on every rank."""
        self._parts.stepper.settle()
        self._access.set_optimizer_state(name, key, value, self._require_optimizer())

    def _require_optimizer(self) -> Optimizer:
        if self.optimizer is None:
            raise EngineError("No optimizer is bound. Call engine.bind_optimizer(optimizer) first.")
        return self.optimizer

    def save(self, directory: str, *, save: Save | None = None) -> None:
        """Write masters, optimizer state, loss scale and RNG to directory/hf_speed. Collective.

        Args:
            directory: the checkpoint; with checkpoint.asynchronous, there after `saves.wait()`.
            save: that this is a part of; None: it is one by itself.
        """
        self._parts.stepper.settle()
        save_engine(self, directory, save or self.saves.begin(f"Saving {directory}"))

    def load(self, directory: str) -> OptimizerChange | None:
        """Read what `save` wrote, on any number of ranks and at any stage. Collective.

        The weights are not part of it: load them first, from the Hub files beside it.

        Returns:
            How the stored optimizer became the bound one; None where none is bound.
        """
        self.saves.wait()
        self._parts.stepper.settle()
        return load_engine(self, directory)

    def stats(self) -> StepStats:
        """Figures for logs. No collective."""
        return StepStats(
            grad_norm=None if (norm := self._parts.stepper.grad_norm) is None else float(norm),
            loss_scale=self.loss_scale,
            bytes_sent=self._parts.mesh.journal.total_bytes_sent,
            peak_bytes={**peak_bytes(self._device), **self._parts.tiers.peak_bytes},
        )

    def offload_states(
        self, tier: Literal["host", "disk"] = "host", *, paths: Sequence[str] = ()
    ) -> int:
        """Free the device: parameters, masters and optimizer states go to another tier.

        Gradients are cleared, as by zero_grad(). No collective; call it on every rank.

        Args:
            tier: where to.
            paths: directories of the disk tier; none: offload.paths of the config.

        Returns:
            Bytes that this rank has parked.

        Raises:
            EngineError: they are parked already, or a scope of gathered() is open.
            OffloadError: the tier has no room.
        """
        self._parts.stepper.settle()
        self.saves.secure()
        if self._gathered_depth:
            raise EngineError("offload_states() inside gathered(): leave that scope first.")
        store = self._parts.tiers.new_store(tier, paths)
        self._parked = ParkedStates(self._parts, self.optimizer, store)
        self._parts.stepper.is_parked = True
        return self._parked.num_bytes

    def reload_states(self) -> None:
        """Bring back what `offload_states` parked.

        Raises:
            EngineError: nothing is parked.
        """
        if self._parked is None:
            raise EngineError("Nothing is parked: call offload_states() before reload_states().")
        parked, self._parked = self._parked, None
        parked.reload(self.optimizer)
        self._parts.stepper.is_parked = False

    def _before_forward(self) -> None:
        # Of a pipeline's many forwards the first is preceded by this, from outside of them.
        if self._pipeline is None:
            self.check_in_place()

    def check_in_place(self) -> None:
        """Raise if the model was changed behind the engine's back, or its memory is parked."""
        self._parts.stepper.check_not_parked()
        for group in self._parts.groups:
            group.check_in_place()

    def _on_backward_end(self) -> None:
        self._parts.stepper.forget_gradients()

    def detach(self) -> None:
        """Give model and optimizer back as plain PyTorch objects with whole values. Collective."""
        self.saves.wait()
        self.release_optimizer()
        whole = self._whole_values() if self._parts.division.is_divided else {}
        if self._pipeline is not None:
            self._pipeline.undo()
        for group in self._parts.groups:
            full = self._access._full_values(group, master=True)
            group.restore(full)
            group.free()
        self._parts.division.undo(whole.__getitem__)
        self._parts.hooks.remove()
        self._parts.tiers.close()
        unwrap_generate(self._generating)
        unwrap_zero_grad(self.model)
        allow_parts(self.model)
        remove_link(self.model, self._link)
        self._parts.mesh.close()

    def _whole_values(self) -> dict[str, Tensor]:
        """Copies of all whole parameters. Collective."""
        return {name: value.clone() for name, value in self.full_parameters(master=True)}


def _device_of(model: nn.Module) -> torch.device:
    for parameter in model.parameters():
        if not parameter.is_meta:
            return parameter.device
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
