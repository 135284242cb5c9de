"""Slices of parameters against the same slices made by indexing."""

from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_speed.shard.reshard import cover_error
from hf_speed.shard.slicing import Slicing, Stretch, interval_runs

NUM_RANKS = 4


@st.composite
def parts(draw: st.DrawFn, dim: int) -> Slicing:
    """Even, uneven (with ranks that hold nothing) or repeated, on NUM_RANKS ranks."""
    copies = draw(st.sampled_from([1, 2, 4]))
    lengths = st.lists(
        st.integers(0, 3), min_size=NUM_RANKS // copies, max_size=NUM_RANKS // copies
    )
    return Slicing.uneven(dim, draw(lengths), copies=copies)


@st.composite
def sliced(draw: st.DrawFn) -> tuple[Slicing, tuple[int, ...]]:
    """A slicing of one to three fused parts, and the shape of a whole tensor that it divides."""
    num_dims = draw(st.integers(1, 3))
    dim = draw(st.integers(0, num_dims - 1))
    slicing = Slicing.fused(draw(st.lists(parts(dim), min_size=1, max_size=3)))
    shape = [draw(st.integers(1, 4)) for _ in range(num_dims)]
    shape[dim] = slicing.size
    return slicing, tuple(shape)


def _numbered(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(prod(shape)).reshape(shape)


def _expected(slicing: Slicing, whole: torch.Tensor, rank: int) -> torch.Tensor:
    held = [
        index for start, length in slicing.stretches[rank] for index in range(start, start + length)
    ]
    return whole.index_select(slicing.dim, torch.tensor(held, dtype=torch.int64))


@given(sliced())
def test_a_cut_is_the_stretches_in_order_and_join_is_its_inverse(
    case: tuple[Slicing, tuple[int, ...]],
) -> None:
    slicing, shape = case
    whole = _numbered(shape)
    locals_ = [slicing.cut(whole, rank) for rank in range(NUM_RANKS)]
    for rank, local in enumerate(locals_):
        assert torch.equal(local, _expected(slicing, whole, rank))
        assert local.is_contiguous()
        assert tuple(local.shape) == slicing.local_shape(shape, rank)
        assert slicing.whole_shape(tuple(local.shape)) == shape
    assert torch.equal(slicing.join(locals_), whole)


@given(sliced(), st.data())
@settings(max_examples=200)
def test_runs_are_the_local_interval_at_its_place_in_the_whole(
    case: tuple[Slicing, tuple[int, ...]], data: st.DataObject
) -> None:
    slicing, shape = case
    whole = _numbered(shape)
    rank = data.draw(st.integers(0, NUM_RANKS - 1))
    local = slicing.cut(whole, rank)
    start = data.draw(st.integers(0, local.numel()))
    numel = data.draw(st.integers(0, local.numel() - start))
    interval = local.reshape(-1)[start : start + numel]
    filled = torch.full((numel,), -1)
    runs = list(slicing.runs(tuple(local.shape), rank, start, numel))
    for run in runs:
        expected = whole[run.box.slices()]
        assert torch.equal(run.view(interval), expected)
        run.view(filled).copy_(expected)
    assert torch.equal(filled, interval)
    assert sum(run.box.numel for run in runs) == numel
    assert len(runs) <= max(1, len(slicing.stretches[rank])) * (2 * len(shape) - 1)


@given(sliced(), st.data())
def test_counted_runs_of_all_ranks_and_intervals_cover_the_whole_once(
    case: tuple[Slicing, tuple[int, ...]], data: st.DataObject
) -> None:
    slicing, shape = case
    found = []
    for rank in range(NUM_RANKS):
        local = slicing.local_shape(shape, rank)
        cuts = sorted(data.draw(st.lists(st.integers(0, prod(local)), max_size=3)))
        for begin, end in pairwise([0, *cuts, prod(local)]):
            found += slicing.runs(local, rank, begin, end - begin, counted_only=True)
    assert cover_error(shape, tuple(run.box for run in found)) is None


@pytest.mark.parametrize(("shape", "start", "numel"), [((3, 4), 2, 9), ((5,), 1, 3), ((), 0, 1)])
def test_runs_of_an_unsliced_tensor_are_the_interval(
    shape: tuple[int, ...], start: int, numel: int
) -> None:
    whole = _numbered(shape)
    interval = whole.reshape(-1)[start : start + numel]
    runs = list(interval_runs(shape, start, numel, slicing=None))
    assert sum(run.box.numel for run in runs) == numel
    assert all(torch.equal(run.view(interval), whole[run.box.slices()]) for run in runs)


def test_fused_parts_are_cut_each_by_itself() -> None:
    slicing = Slicing.fused([Slicing.even(1, 6, 2), Slicing.even(1, 4, 2)])
    assert slicing.stretches == (
        (Stretch(0, 3), Stretch(6, 2)),
        (Stretch(3, 3), Stretch(8, 2)),
    )
    assert not slicing.is_repeated
    # Rows of three elements and two: the first of both rows is one run, with the second left out.
    runs = list(slicing.runs((2, 5), 0, 0, 10))
    assert [(run.box.offsets, run.box.extents, run.start) for run in runs] == [
        ((0, 0), (2, 3), 0),
        ((0, 6), (2, 2), 3),
    ]


def test_repeated_stretches_have_sharers_of_which_the_first_counts() -> None:
    heads = Slicing.even(0, 6, 4, copies=2)
    assert heads.is_repeated
    assert [heads.sharers(rank) for rank in range(4)] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [heads.counted(rank) for rank in range(4)] == [
        (Stretch(0, 3),),
        (),
        (Stretch(3, 3),),
        (),
    ]
    fused = Slicing.fused([Slicing.even(0, 8, 4), heads])
    assert fused.is_repeated
    assert fused.sharers(1) == (1,)
    assert fused.counted(1) == (Stretch(2, 2),)
    # Two ranks that hold nothing do not share it.
    few = Slicing.uneven(0, [1, 1, 0, 0])
    assert not few.is_repeated
    assert [few.sharers(rank) for rank in range(4)] == [(0,), (1,), (2,), (3,)]
    first, second = fused.cut(torch.arange(14), 0), fused.cut(torch.arange(14), 1)
    second[2:] = -1
    rest = [fused.cut(torch.arange(14), rank) for rank in (2, 3)]
    assert torch.equal(fused.join([first, second, *rest]), torch.arange(14))


def test_a_cut_shares_no_memory_and_needs_none_on_meta() -> None:
    whole = torch.zeros(4, 2, requires_grad=True)
    local = Slicing.even(0, 4, 2).cut(whole, 0)
    local.fill_(1)
    assert not local.requires_grad
    assert not whole.any()
    assert Slicing.even(0, 4, 2).cut(torch.empty(4, 2, device="meta"), 1).shape == (2, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Slicing(0, 4, ((Stretch(0, 3),), (Stretch(2, 2),))), "overlap in part at 2 of 4"),
        (lambda: Slicing(0, 4, ((Stretch(0, 2),), (Stretch(3, 1),))), "leave a gap at 2 of 4"),
        (lambda: Slicing(0, 4, ((Stretch(0, 3),),)), "leave a gap at 3 of 4 along dim 0"),
        (lambda: Slicing(0, 2, ((Stretch(0, 2), Stretch(0, 2)),)), "Rank 0 holds a stretch twice"),
        (lambda: Slicing(-1, 2, ((Stretch(0, 2),),)), "dim of at least 0 .* not dim -1"),
        (lambda: Slicing.even(0, 5, 2), "5 elements cannot be cut evenly for 2 ranks"),
        (lambda: Slicing.even(0, 6, 4, copies=3), "for 4 ranks with 3 copies"),
        (lambda: Slicing.uneven(0, [2, -1]), "negative length"),
        (
            lambda: Slicing.fused([Slicing.even(0, 2, 2), Slicing.even(1, 2, 2)]),
            "one dim and one number of ranks",
        ),
        (lambda: Slicing.even(1, 4, 2).cut(torch.zeros(4, 5), 0), "expects 4 along dim 1"),
        (lambda: Slicing.even(0, 4, 2).join([torch.zeros(2)]), "1 parts .* that 2 ranks hold"),
        (
            lambda: Slicing.even(0, 4, 2).join([torch.zeros(2), torch.zeros(3)]),
            r"part of rank 1 has shape \(3,\), but this slicing expects 2 along dim 0",
        ),
        (lambda: list(Slicing.even(0, 4, 2).runs((3,), 0, 0, 1)), "expects 2 along dim 0"),
        (lambda: list(Slicing.even(0, 4, 2).runs((2,), 0, 1, 2)), "is not within a tensor"),
    ],
)
def test_what_is_no_division_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
