"""What is in flight on the rows of a store: transfers of the same bytes keep their order."""

from collections import defaultdict
from typing import Generic, NamedTuple, TypeVar

from hf_speed.offload.store import Settled

T = TypeVar("T", bound=Settled)


class Transfer(NamedTuple, Generic[T]):
    """An interval on its way, in whatever unit the store counts."""

    start: int
    stop: int
    is_write: bool
    ticket: T


class InFlight(Generic[T]):
    """Transfers by key, until they are done."""

    def __init__(self) -> None:
        self._by_key: dict[str, list[Transfer[T]]] = defaultdict(list)

    def add(self, key: str, transfer: Transfer[T]) -> None:
        """Remember a transfer."""
        self._by_key[key].append(transfer)

    def before(self, key: str, start: int, stop: int, *, is_write: bool) -> list[T]:
        """What a transfer of [start, stop) has to come after: reads may pass each other."""
        return [
            each.ticket
            for each in self._by_key.get(key, ())
            if (is_write or each.is_write) and each.start < stop and start < each.stop
        ]

    def of(self, key: str) -> list[T]:
        """All that is in flight on a key."""
        return [each.ticket for each in self._by_key.get(key, ())]

    def reap(self) -> list[tuple[str, Transfer[T]]]:
        """Forget what is done, and give it."""
        done: list[tuple[str, Transfer[T]]] = []
        for key in list(self._by_key):
            going = []
            for each in self._by_key[key]:
                if each.ticket.done():
                    done.append((key, each))
                else:
                    going.append(each)
            if going:
                self._by_key[key] = going
            else:
                del self._by_key[key]
        return done

    def take_all(self) -> list[tuple[str, Transfer[T]]]:
        """Forget everything, and give it."""
        everything = [(key, each) for key, some in self._by_key.items() for each in some]
        self._by_key.clear()
        return everything

    def drop(self, key: str) -> None:
        """Forget a key."""
        self._by_key.pop(key, None)
