"""The optimizer's step where buffers live on several tiers: a walk over chunks of every group.

    gradient, master, moments  ->  update  ->  master, moments, working values
    (fetched one chunk ahead)                  (committed behind)

Moments live in cells beside the masters. In `optimizer.state` stand views of them where a tier can
be addressed, else placeholders of the right shape; `exposed` brings the values there, for saving,
loading and looking.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_speed.offload import Store
from hf_speed.optim.rules import StateSpec, UpdateRule
from hf_speed.zero.background import Assumed, BackgroundUpdates
from hf_speed.zero.cells import Cell, ShadowedCell, StoreCell, TensorCell, scratch, twin_of
from hf_speed.zero.chunks import GRAIN_NUMEL, Job, Operand, Walk
from hf_speed.zero.group import FlatGroup
from hf_speed.zero.parameter import placeholder_of
from hf_speed.zero.states import tensor_states
from hf_speed.zero.update import FusedUpdate, Part, TorchUpdate, Updater


class SharedWalk(NamedTuple):
    """A second walk, which takes a share of every group at the same time.

    Attributes:
        walk: on another device.
        share: of each group's elements, 0 to 1.
    """

    walk: Walk
    share: float


class StreamedUpdates:
    """Updates the groups of one optimizer, chunk by chunk.

    Args:
        optimizer: the user's, whose param_groups hold the pieces.
        groups: all trainable groups.
        store: of the states; None is the memory of the walk's device.
        walk: moves chunks.
        rule: what the optimizer's class computes, as one pass; None: the optimizer computes itself.
        moments: dtype in which a rule's moments are kept.
        when: in `run`; in the background of the backward, to be confirmed by `run`; or in the
            background until the next `run`. The last two need a rule for every group.
        shared: takes a part of every group's update; needs a rule, whose numbers are the same
            wherever it is computed.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        groups: Sequence[FlatGroup],
        *,
        store: Store | None,
        walk: Walk,
        rule: UpdateRule | None,
        moments: torch.dtype,
        when: Literal["after", "speculative", "delayed"] = "after",
        shared: SharedWalk | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._groups = tuple(groups)
        self._store = store
        self._walk = walk
        self._shared = shared
        self._rule = rule
        self._torch = TorchUpdate(optimizer)
        self._moments = moments
        self._when = when
        self._fused = FusedUpdate(optimizer, rule, moments) if rule is not None else None
        self._cells: dict[FlatGroup, dict[str, Cell]] = {group: {} for group in self._groups}
        self._specs: dict[FlatGroup, dict[str, StateSpec]] = {group: {} for group in self._groups}
        for group in self._groups:
            # What the optimizer had before it was bound.
            with self.exposed(group, modify=True):
                pass
            for spec in self._updater(group).states(group) or ():
                self._cell(group, spec)
            self._publish(group)
        self.background: BackgroundUpdates | None = None
        if when != "after":
            shadowed = {group: self._shadow(group) for group in self._groups}
            self.background = BackgroundUpdates(shadowed)

    def _shadow(self, group: FlatGroup) -> list[ShadowedCell]:
        cells = group.shadow()
        for kind, cell in self._cells[group].items():
            shadowed = ShadowedCell(cell, twin_of(cell))
            self._cells[group][kind] = shadowed
            cells.append(shadowed)
        return cells

    def _updater(self, group: FlatGroup) -> Updater:
        """Rules update fp32 masters; groups of another dtype are the optimizer's own."""
        if self._fused is not None and group.dtypes.master == torch.float32:
            return self._fused
        return self._torch

    def _cell(self, group: FlatGroup, spec: StateSpec) -> Cell:
        cells = self._cells[group]
        if spec.name not in cells:
            numel = -(-group.layout.part_numel // spec.block)
            if self._store is None:
                zeros = torch.zeros(numel, dtype=spec.dtype, device=self._walk.device)
                cells[spec.name] = TensorCell(zeros)
            else:
                key = f"{group.name}/{spec.name}"
                cells[spec.name] = StoreCell(self._store, key, numel, spec.dtype)
            self._specs[group][spec.name] = spec
        return cells[spec.name]

    def run(self, *, scale: float) -> None:
        """Step every group: pieces without a gradient are left alone, counters included.

        Args:
            scale: factor on every gradient.
        """
        active = [g for g in self._groups if any(piece.grad is not None for piece in g.pieces)]
        if self._when == "delayed":
            self.flush()
            for group in active:
                self._start(group, used_pieces(group), scale)
            return
        left = [group for group in active if not self._confirm(group, scale)]
        if self.background is not None:
            self.background.refuse_all()
        by_updater: dict[Updater, list[FlatGroup]] = {}
        for group in left:
            by_updater.setdefault(self._updater(group), []).append(group)
        for updater, groups in by_updater.items():
            updater.begin([piece for group in groups for piece in used_pieces(group)])
            _run(self._plan(groups, updater, scale, apart=False))
            updater.end()
        for group in active:
            self._publish(group)

    def backward_begins(self) -> None:
        """Gradients will change: what was updated with the old ones does not count."""
        if self._when == "speculative" and self.background is not None:
            self.background.refuse_all()

    def reduced(self, group: FlatGroup, *, scale: float) -> None:
        """The gradient of a group may be final: where the config says so, its update starts."""
        if self._when == "speculative":
            self._start(group, group.pieces, scale)

    def _start(self, group: FlatGroup, pieces: Sequence[nn.Parameter], scale: float) -> None:
        """Begin to update a group into the second buffers."""
        if self.background is None or self._rule is None:
            return
        if self._updater(group) is not self._fused:
            return
        updater = FusedUpdate(self._optimizer, self._rule, self._moments)
        updater.begin(pieces)
        plan = self._plan([group], updater, scale, apart=True)
        if self._when == "delayed":
            group.hand_over_gradient()
        self.background.start(
            group,
            Assumed(scale, updater.signature()),
            partial(_run, plan),
            updater.end,
        )

    def _confirm(self, group: FlatGroup, scale: float) -> bool:
        """Accept a group's update if what it assumed is so."""
        if self.background is None or self._rule is None:
            return False
        actual = FusedUpdate(self._optimizer, self._rule, self._moments)
        actual.begin(used_pieces(group))
        return self.background.accept(group, Assumed(scale, actual.signature()))

    def flush(self) -> bool:
        """Finish what runs since the last step; whether there was anything."""
        if self._when != "delayed" or self.background is None:
            return False
        groups = self.background.groups
        for group in groups:
            self.background.accept(group, None)
            self._publish(group)
        return bool(groups)

    def _plan(
        self, groups: Sequence[FlatGroup], updater: Updater, scale: float, *, apart: bool
    ) -> list[tuple[Walk, list[Job]]]:
        """The chunks of some groups, on the walks that will do them."""
        if self._shared is None or isinstance(updater, TorchUpdate):
            return [
                (
                    self._walk,
                    self._jobs(groups, updater, scale, _Share(self._walk, 0.0, 1.0, apart)),
                )
            ]
        walk, share = self._shared
        mine, theirs = (
            _Share(self._walk, 0.0, 1.0 - share, apart),
            _Share(walk, 1.0 - share, 1.0, apart),
        )
        return [(each.walk, self._jobs(groups, updater, scale, each)) for each in (theirs, mine)]

    def _jobs(
        self, groups: Sequence[FlatGroup], updater: Updater, scale: float, share: "_Share"
    ) -> list[Job]:
        jobs = []
        for group in groups:
            operands = self._operands(group, apart=share.apart)

            def work(values: Mapping[str, Tensor], start: int, group: FlatGroup = group) -> None:
                made = updater.update(Part(group, start, values, scale))
                for kind, value in made.items():
                    cell = self._cell(group, StateSpec(kind, value.dtype, 1))
                    cell.commit(value, start).wait()

            first, last = share.of(group.layout.part_numel)
            for start, numel in share.walk.cut(list(operands.values()), first, last):
                jobs.append(Job(operands, start, numel, partial(work, start=start)))
        return jobs

    def _operands(self, group: FlatGroup, *, apart: bool) -> dict[str, Operand]:
        gradient = group.gradient_cell
        if gradient is None and group.grad is not None:
            gradient = TensorCell(group.grad)
        operands = {"master": _written(group.master_cell, apart=apart)}
        if gradient is not None:
            operands["gradient"] = Operand(gradient, reads=True, writes=False)
        working = group.working_cell
        if working is not None:
            operands["working"] = _written(working, apart=apart)._replace(reads=False)
        for kind, cell in self._cells[group].items():
            block = self._specs[group][kind].block
            operands[kind] = _written(cell, apart=apart)._replace(block=block)
        return operands

    @contextmanager
    def exposed(self, group: FlatGroup, *, modify: bool = False) -> Iterator[None]:
        """Masters in the pieces and whole states in `optimizer.state` inside, in master precision.

        Args:
            group: trainable.
            modify: keep changes, states that are new among them.
        """
        with group.in_memory(modify=modify):
            raw = {kind: self._read(cell) for kind, cell in self._cells[group].items()}
            shown = self._floats(group, raw)
            for piece, part in self._parts(group):
                for kind, values in shown.items():
                    if kind in self._optimizer.state[piece]:
                        self._optimizer.state[piece][kind] = values[part].view(piece.shape)
            yield
            if modify:
                self._absorb(group, raw, shown)
        self._publish(group)

    def _absorb(
        self, group: FlatGroup, raw: Mapping[str, Tensor], shown: dict[str, Tensor]
    ) -> None:
        """Take the states in `optimizer.state` into the cells."""
        for piece, part in self._parts(group):
            for kind, value in tensor_states(self._optimizer, piece).items():
                whole = shown.get(kind)
                if whole is None:
                    whole = torch.zeros(
                        group.layout.part_numel, dtype=value.dtype, device=self._walk.device
                    )
                    shown[kind] = whole
                if whole[part].data_ptr() != value.data_ptr():
                    whole[part].copy_(value.reshape(-1))
        specs = {spec.name: spec for spec in self._updater(group).states(group) or ()}
        for kind, whole in shown.items():
            spec = specs.get(kind, StateSpec(kind, whole.dtype, 1))
            cell = self._cell(group, spec)
            if spec.dtype == whole.dtype:
                _write(cell, whole)
            elif self._rule is not None:
                related = [name for name in specs if name == kind or name.startswith(f"{kind}.")]
                target = {name: raw.get(name) for name in related}
                self._encode(group, kind, whole, target, specs)

    def _encode(
        self,
        group: FlatGroup,
        kind: str,
        whole: Tensor,
        target: Mapping[str, Tensor | None],
        specs: Mapping[str, StateSpec],
    ) -> None:
        """Write a moment in the dtype that the rule keeps it in."""
        if self._rule is None:
            return
        buffers = {}
        for name, held in target.items():
            cell = self._cell(group, specs[name])
            buffers[name] = scratch(cell.numel, cell.dtype, whole.device) if held is None else held
        self._rule.from_float(kind, whole, buffers)
        for name, values in buffers.items():
            _write(self._cell(group, specs[name]), values)

    def _floats(self, group: FlatGroup, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cells' contents as one value per element."""
        shown = {}
        for kind, values in raw.items():
            spec = self._specs[group][kind]
            if spec.block > 1:
                continue
            narrow = self._rule is not None and values.dtype != group.dtypes.master
            fused = self._updater(group) is self._fused
            shown[kind] = (
                self._rule.to_float(kind, raw) if narrow and fused and self._rule else values
            )
        return shown

    def _read(self, cell: Cell) -> Tensor:
        view = cell.view()
        if view is not None:
            return view
        values = scratch(cell.numel, cell.dtype, self._walk.device)
        cell.fetch(values).wait()
        return values

    def _parts(self, group: FlatGroup) -> Iterator[tuple[nn.Parameter, slice]]:
        for piece, slot_piece in zip(group.pieces, group.piece_slots(), strict=True):
            start = slot_piece.part_start
            yield piece, slice(start, start + slot_piece.numel)

    def _publish(self, group: FlatGroup) -> None:
        """Let `optimizer.state` show what the cells hold, or that they hold it."""
        for kind, cell in self._cells[group].items():
            if self._specs[group][kind].block > 1:
                continue
            view = cell.view()
            readable = view is not None and view.dtype == group.dtypes.master
            for piece, part in self._parts(group):
                state = self._optimizer.state.get(piece)
                if not state:
                    continue
                if view is not None and readable:
                    state[kind] = view[part].view(piece.shape)
                else:
                    state[kind] = placeholder_of(
                        piece.shape, dtype=group.dtypes.master, device=self._walk.device
                    )

    def close(self) -> None:
        """Free the states."""
        if self.background is not None:
            self.background.close()
        for cells in self._cells.values():
            for cell in cells.values():
                cell.free()
        self._cells = {group: {} for group in self._groups}


def used_pieces(group: FlatGroup) -> list[nn.Parameter]:
    """Pieces that have a gradient."""
    return [piece for piece in group.pieces if piece.grad is not None]


class _Share(NamedTuple):
    """The part of every group that a walk does, from `first` to `last` of the whole.

    `apart`: into second buffers.
    """

    walk: Walk
    first: float
    last: float
    apart: bool

    def of(self, numel: int) -> tuple[int, int]:
        """The elements, from a start that a chunk may have."""
        first, last = (int(end * numel) // GRAIN_NUMEL * GRAIN_NUMEL for end in self[1:3])
        return first, numel if self.last == 1.0 else last


def _run(plan: Sequence[tuple[Walk, list[Job]]]) -> None:
    """Do all jobs, each walk's in its own thread."""
    (walk, jobs), *others = plan
    if not others:
        walk.run(jobs)
        return
    with ThreadPoolExecutor(max_workers=len(others)) as threads:
        futures = [threads.submit(other.run, theirs) for other, theirs in others]
        walk.run(jobs)
        for future in futures:
            future.result()


def _written(cell: Cell, *, apart: bool) -> Operand:
    """An operand that is updated, in place or into its second buffer."""
    into = cell.shadow if apart and isinstance(cell, ShadowedCell) else None
    return Operand(cell, reads=True, writes=True, apart=into)


def _write(cell: Cell, values: Tensor) -> None:
    view = cell.view()
    if view is None or view.data_ptr() != values.data_ptr():
        cell.commit(values).wait()
