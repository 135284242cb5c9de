"""Dealing features and attention heads out to ranks: arithmetic.

Whole heads only, and with each key-value head the queries that read it. Where heads do not divide,
some ranks get one more. Where there are fewer key-value heads than ranks, neighbouring ranks hold
the same one, each with its part of the queries.

    8 heads, 4 of keys and values, 2 ranks     4 + 2   4 + 2
    6 heads, 3 of keys and values, 2 ranks     4 + 2   2 + 1
    8 heads, 2 of keys and values, 4 ranks     4 + kv 0   4 + kv 0   4 + kv 1   4 + kv 1
"""

from collections.abc import Callable
from typing import NamedTuple

from hf_speed.shard.slicing import Slicing


class Share(NamedTuple):
    """The heads of one rank."""

    num_heads: int
    num_kv_heads: int


class Heads(NamedTuple):
    """An attention layer's heads and who holds them.

    Attributes:
        num_heads: of queries, in the whole model.
        num_kv_heads: of keys and values.
        shares: by rank.
        copies: neighbouring ranks that hold the same key-value head; 1 where all are different.
    """

    num_heads: int
    num_kv_heads: int
    shares: tuple[Share, ...]
    copies: int

    def queries(self, width: int) -> Slicing:
        """The division of features that belong to query heads, `width` of them to each head."""
        return Slicing.uneven(0, [share.num_heads * width for share in self.shares])

    def keys(self, width: int) -> Slicing:
        """The division of features that belong to key-value heads, `width` of them to each."""
        lengths = [share.num_kv_heads * width for share in self.shares[:: self.copies]]
        return Slicing.uneven(0, lengths, copies=self.copies)


def deal(total: int, num_ranks: int) -> list[int]:
    """Shares of `total` that differ by one at most, the larger ones first."""
    least, rest = divmod(total, num_ranks)
    return [least + (rank < rest) for rank in range(num_ranks)]


def features(total: int, num_ranks: int) -> Slicing:
    """The division of `total` features (or words of a vocabulary)."""
    return Slicing.uneven(0, deal(total, num_ranks))


def can_deal(num_heads: int, num_kv_heads: int, num_ranks: int) -> bool:
    """Whether every rank gets a head, and key-value heads are shared evenly if at all."""
    enough = num_ranks <= num_heads and num_heads % num_kv_heads == 0
    return enough and (num_kv_heads >= num_ranks or num_ranks % num_kv_heads == 0)


def deal_heads(num_heads: int, num_kv_heads: int, num_ranks: int) -> Heads:
    """Deal out heads for which `can_deal` holds."""
    group = num_heads // num_kv_heads
    if num_kv_heads >= num_ranks:
        shares = [Share(count * group, count) for count in deal(num_kv_heads, num_ranks)]
        return Heads(num_heads, num_kv_heads, tuple(shares), copies=1)
    copies = num_ranks // num_kv_heads
    shares = [Share(count, 1) for count in deal(group, copies)] * num_kv_heads
    return Heads(num_heads, num_kv_heads, tuple(shares), copies)


def nearest(num_ranks: int, works: Callable[[int], bool]) -> int:
    """The number of ranks nearest to `num_ranks` for which `works`; 1 always does."""
    below = next(count for count in range(num_ranks, 0, -1) if count == 1 or works(count))
    above = range(num_ranks + 1, 2 * num_ranks - below)
    return next((count for count in above if works(count)), below)
