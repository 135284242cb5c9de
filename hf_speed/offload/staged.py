"""Moves between a disk and a GPU through fixed host buffers, on a thread of its own.

    fetch   buffer <- disk, then GPU <- buffer          commit   buffer <- GPU, then disk <- buffer

As many pieces are on their way as there are buffers. A buffer is given back when its piece has
arrived, so the host memory that transfers take is the pool's, whatever their size.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_speed.errors import OffloadError
from hf_speed.offload.copies import Copies, what_ran
from hf_speed.offload.pool import StagingPool
from hf_speed.offload.regions import page_floor
from hf_speed.offload.rowfile import DiskTransfer
from hf_speed.offload.store import Settled

DiskMove = Callable[[Tensor, int], DiskTransfer]
"""Starts moving a (n,) uint8 CPU tensor to or from the row's byte at an offset."""


class StagedTransfer:
    """A fetch or commit between a disk and a GPU. `heard`: the caller knows how it failed."""

    def __init__(
        self,
        tensor: Tensor,
        begin: int,
        *,
        is_write: bool,
        move: DiskMove,
        after: Sequence[Settled],
    ) -> None:
        self.heard = False
        self.raw = tensor.view(torch.uint8)
        self.begin = begin
        self.is_write = is_write
        self.move = move
        self.after = after
        self.failure: Exception | None = None
        self.pieces_left = 0
        self.ready = what_ran(tensor.device)
        self._ended = threading.Event()

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._ended.is_set()

    def settle(self) -> None:
        """Return when nothing moves any more, well or not."""
        self._ended.wait()

    def error(self) -> OffloadError | None:
        """How it failed; None if it did not. After `settle`."""
        if self.failure is None or isinstance(self.failure, OffloadError):
            return self.failure
        error = OffloadError(
            f"a transfer between disk and {self.raw.device} failed: {self.failure}. Resume from a "
            f"checkpoint."
        )
        error.__cause__ = self.failure
        return error

    def wait(self) -> None:
        """Return when the bytes have moved; raise if they have not."""
        self.settle()
        error = self.error()
        if error is not None:
            self.heard = True
            raise error

    def end(self) -> None:
        """Called by the mover when no piece is left."""
        self.after = ()
        self._ended.set()


class _Piece(NamedTuple):
    """One buffer on its way; `steps` issues its two moves and gives what each waits for."""

    transfer: StagedTransfer
    buffer: Tensor
    steps: Iterator[Settled]


class StagedMover:
    """Runs transfers in order on one thread.

    Args:
        staging: where buffers come from; the thread waits for one when none is free.
    """

    def __init__(self, staging: StagingPool) -> None:
        self._staging = staging
        self._copies = Copies()
        self._waiting: deque[StagedTransfer] = deque()
        self._flight: deque[tuple[_Piece, Settled]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._work, name="hf_speed-staged", daemon=True)
        self._thread.start()

    def submit(self, transfer: StagedTransfer) -> None:
        """Queue a transfer.

        Raises:
            OffloadError: this process is a fork of the mover's.
        """
        if os.getpid() != self._pid:
            raise OffloadError(
                "this disk store was made before a fork, and its threads live in the parent "
                "process. Make a store of its own in the child."
            )
        with self._changed:
            self._waiting.append(transfer)
            self._changed.notify_all()

    def close(self) -> None:
        """Finish what was submitted, then end the thread."""
        if os.getpid() != self._pid:
            return  # a fork has no thread to end, and its lock may be held for ever
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._flight or self._closing):
                    self._changed.wait()
                transfer = self._waiting.popleft() if self._waiting else None
            if transfer is not None:
                self._start(transfer)
            elif self._flight:
                self._advance()
            else:
                return
            # A thread that waits for work must not keep the last tensor alive.
            del transfer

    def _start(self, transfer: StagedTransfer) -> None:
        """Set all pieces of a transfer on their way; the last ones are when this returns."""
        if transfer.after:
            # What it must come after may be this thread's own work.
            while self._flight:
                self._advance()
            for earlier in transfer.after:
                earlier.settle()
        transfer.pieces_left = 1  # so that it does not end before all have begun
        try:
            for low, high in self._cuts(transfer):
                buffer = self._take()
                transfer.pieces_left += 1
                steps = self._steps(transfer, buffer[: high - low], low)
                self._step(_Piece(transfer, buffer, steps))
                if transfer.failure is not None:
                    break
        except OffloadError as error:
            transfer.failure = error
        self._end_piece(transfer)

    def _cuts(self, transfer: StagedTransfer) -> Iterator[tuple[int, int]]:
        """Byte intervals that fit a buffer, cut at whole pages."""
        low, end = transfer.begin, transfer.begin + transfer.raw.numel()
        while low < end:
            high = min(page_floor(low) + self._staging.buffer_bytes, end)
            yield low, high
            low = high

    def _take(self) -> Tensor:
        while (buffer := self._staging.try_take()) is None:
            if not self._flight:
                return self._staging.take()
            self._advance()
        return buffer

    def _steps(self, transfer: StagedTransfer, buffer: Tensor, low: int) -> Iterator[Settled]:
        start = low - transfer.begin
        piece = transfer.raw[start : start + buffer.numel()]
        if transfer.is_write:
            yield self._copies.copy(buffer, piece, ready=transfer.ready)
        disk = transfer.move(buffer, low)
        yield disk
        disk.wait()
        if not transfer.is_write:
            yield self._copies.copy(piece, buffer, ready=transfer.ready)

    def _advance(self) -> None:
        """Wait for the move that was issued first, and issue its piece's next."""
        piece, move = self._flight.popleft()
        try:
            move.settle()
        except Exception as error:  # noqa: BLE001 - raised by the ticket's wait
            piece.transfer.failure = piece.transfer.failure or error
        self._step(piece)

    def _step(self, piece: _Piece) -> None:
        move = None
        try:
            move = next(piece.steps, None)
        except Exception as error:  # noqa: BLE001 - raised by the ticket's wait
            piece.transfer.failure = piece.transfer.failure or error
        if move is not None:
            self._flight.append((piece, move))
            return
        self._staging.give(piece.buffer)
        self._end_piece(piece.transfer)

    def _end_piece(self, transfer: StagedTransfer) -> None:
        transfer.pieces_left -= 1
        if transfer.pieces_left == 0:
            transfer.end()
