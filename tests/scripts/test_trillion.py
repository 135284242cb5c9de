"""The tables of a trillion parameters are the planner's, and those agree with the formulas."""

import pytest
import trillion


@pytest.fixture(scope="module")
def found() -> trillion.Found:
    return trillion.plan_all()


def test_readme_has_the_planners_tables(found: trillion.Found) -> None:
    readme = trillion.README.read_text()
    assert trillion.place(readme, trillion.render(found)) == readme


def test_a_readme_without_the_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"README\.md needs the lines .*trillion: begin"):
        trillion.place("no markers", "table")


def test_the_model_has_a_trillion_parameters_on_4096_ranks(found: trillion.Found) -> None:
    assert found.numel > 1e12
    assert trillion.STAGES * trillion.SLICES * trillion.DATA == 4096
    assert [len(each.mesh.ranks) for each in found.rows] == [trillion.STAGES] * 5


def test_what_is_counted_is_what_the_formulas_give(found: trillion.Found) -> None:
    both = (*trillion.formulas_of_memory(found), *trillion.formulas_of_step(found))
    assert len(both) == 15
    for each in both:
        assert each.counted == pytest.approx(each.value, rel=0.005), each.what


def test_every_rank_fits_a_gpu_of_80_gib(found: trillion.Found) -> None:
    totals = [each.fullest.state.total + each.fullest.activations for each in found.rows]
    assert max(totals) < 80 * trillion.GIB
    # Each stage holds less than the one before, or as much.
    states = [each.fullest.state.total for each in found.rows]
    assert states[0] > states[1] == states[2] > states[3]
