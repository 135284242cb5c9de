"""Heads and features dealt out to ranks."""

from hypothesis import given
from hypothesis import strategies as st

from hf_speed.nn.sliced.deal import Share, can_deal, deal, deal_heads, features, nearest

RANKS = st.integers(1, 9)


@given(total=st.integers(0, 100), num_ranks=RANKS)
def test_shares_add_up_and_differ_by_one_at_most(total: int, num_ranks: int) -> None:
    shares = deal(total, num_ranks)
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True)
    slicing = features(total, num_ranks)
    assert [slicing.local_size(rank) for rank in range(num_ranks)] == shares


@given(group=st.integers(1, 6), num_kv_heads=st.integers(1, 6), num_ranks=RANKS)
def test_every_rank_gets_whole_heads_with_their_keys(
    group: int, num_kv_heads: int, num_ranks: int
) -> None:
    num_heads = group * num_kv_heads
    if not can_deal(num_heads, num_kv_heads, num_ranks):
        too_many = num_ranks > num_heads
        assert too_many or (num_ranks > num_kv_heads and num_ranks % num_kv_heads)
        return
    heads = deal_heads(num_heads, num_kv_heads, num_ranks)
    queries, keys = heads.queries(3), heads.keys(2)
    assert queries.size == 3 * num_heads
    assert keys.size == 2 * num_kv_heads
    assert not queries.is_repeated
    assert keys.is_repeated == (num_kv_heads < num_ranks)
    for rank, share in enumerate(heads.shares):
        assert share.num_heads >= 1
        assert share.num_heads % share.num_kv_heads == 0
        assert queries.local_size(rank) == 3 * share.num_heads
        assert keys.local_size(rank) == 2 * share.num_kv_heads
        # The keys of a rank are those that its queries read in the whole model.
        first = sum(each.num_heads for each in heads.shares[:rank])
        read = {head // group for head in range(first, first + share.num_heads)}
        held = {
            start // 2 + place
            for start, length in keys.stretches[rank]
            for place in range(length // 2)
        }
        assert read == held


def test_heads_that_do_not_divide_are_dealt_unevenly() -> None:
    assert deal_heads(6, 3, 2).shares == (Share(4, 2), Share(2, 1))
    assert deal_heads(14, 2, 4).shares == (Share(4, 1), Share(3, 1)) * 2
    assert deal_heads(14, 2, 4).keys(1).sharers(3) == (2, 3)


def test_the_nearest_number_of_ranks_that_works_is_found_on_either_side() -> None:
    assert nearest(8, lambda count: count in (2, 6, 9)) == 9
    assert nearest(8, lambda count: count in (2, 6, 11)) == 6
    assert nearest(8, lambda count: count == 7 or count == 9) == 7
    assert nearest(5, lambda _: False) == 1
    assert nearest(4, lambda count: count == 4) == 4
