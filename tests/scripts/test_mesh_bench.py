"""The bench of meshes: it sees differences, and its toys train alike in one process."""

import mesh_equality
import pytest
from mesh_toys import KINDS, NO_CLIP, Case, Figures, alone, on_mesh

STEPS = 2


def test_differences_on_any_rank_are_seen() -> None:
    theirs = Figures([2.0, 1.0], [4.0, 4.0], {"weight": "a", "bias": "b"})
    other = Figures([2.0, 1.0], [4.0, 4.002], {"weight": "a", "bias": "c"})
    assert mesh_equality.furthest([theirs, theirs], theirs) == 0.0
    assert mesh_equality.furthest([theirs, other], theirs) == pytest.approx(5e-4)
    assert mesh_equality.num_different([theirs, theirs], theirs) == 0
    assert mesh_equality.num_different([theirs, other], theirs) == 1
    fewer = theirs._replace(losses=[2.0, 1.5], digests={"weight": "a"})
    assert mesh_equality.num_different([fewer], theirs) == 2


def test_a_row_holds_within_what_is_allowed() -> None:
    expected = alone(Case("Llama", 1, 1, 0, STEPS))
    near = expected._replace(losses=[each * (1 + 5e-6) for each in expected.losses])
    far = expected._replace(norms=[each * (1 + 5e-5) for each in expected.norms])
    for figures, holds in ((near, True), (far, False)):
        (row,) = mesh_equality.equality_rows(
            lambda _, figures=figures: [figures], ["Llama"], [(2, 2, 2)], steps=STEPS
        )
        assert row.holds == holds
    (row,) = mesh_equality.bitwise_rows(lambda _: [far], 4, ["Llama"], ["1f1b"], steps=STEPS)
    assert not row.holds


@pytest.mark.parametrize("kind", KINDS)
def test_toys_train_alike_under_an_engine_of_one_process(kind: str) -> None:
    case = Case(kind, 1, 1, 1, STEPS, clip=NO_CLIP)
    ours, theirs = on_mesh(case), alone(case)
    assert mesh_equality.num_different([ours], theirs) == 0
