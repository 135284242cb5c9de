"""Regions never overlap and leave no hole that could be used; written bytes are remembered."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from hf_speed.offload.regions import Region, Regions, Written, page_ceil, page_floor

PAGE = 4096


@given(st.lists(st.tuples(st.integers(0, 5 * PAGE), st.floats(0, 1), st.booleans()), max_size=60))
def test_regions_are_apart_and_are_used_again(steps: list[tuple[int, float, bool]]) -> None:
    regions, held = Regions(), []
    for nbytes, which, gives in steps:
        if gives and held:
            regions.give(held.pop(int(which * (len(held) - 1))))
            continue
        region = regions.place(nbytes)
        assert region.nbytes == page_ceil(nbytes)
        assert region.start % PAGE == 0
        regions.take(region)
        held.append(region)
        ordered = sorted(each for each in held if each.nbytes)
        for before, after in itertools.pairwise(ordered):
            assert before.stop <= after.start
    used = sum(each.nbytes for each in held)
    assert used + sum(each.nbytes for each in regions._free) == regions.end
    for region in held:
        regions.give(region)
    assert regions._free == ([Region(0, regions.end)] if regions.end else [])


def test_the_smallest_hole_that_fits_is_taken_and_the_last_one_grows() -> None:
    regions = Regions()
    rows = []
    for pages in (4, 1, 2, 1, 3):
        rows.append(regions.place(pages * PAGE))
        regions.take(rows[-1])
    regions.give(rows[0])
    regions.give(rows[2])
    assert regions.place(2 * PAGE) == rows[2]
    assert regions.place(3 * PAGE).start == 0
    regions.give(rows[4])
    assert regions.place(9 * PAGE) == Region(8 * PAGE, 17 * PAGE)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)), max_size=30))
def test_written_is_a_set_of_bytes(adds: list[tuple[int, int]]) -> None:
    written, plain = Written(), [False] * 60
    for start, count in adds:
        written.add(start, start + count)
        plain[start : start + count] = [True] * count
        for low, high in ((0, 60), (5, 50), (start, start + count), (7, 7)):
            found = list(written.pieces(low, high))
            assert [flag for a, b, flag in found for _ in range(a, b)] == plain[low:high]
            assert all(a < b for a, b, _ in found)
    edges = written._edges
    assert edges == sorted(set(edges))
    copy = written.copy()
    copy.add(0, 60)
    assert written._edges == edges


def test_pages() -> None:
    assert [page_floor(n) for n in (0, 1, 4096, 8191)] == [0, 0, 4096, 4096]
    assert [page_ceil(n) for n in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]
