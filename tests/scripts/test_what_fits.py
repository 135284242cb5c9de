"""README's table of what fits where is the planner's."""

import pytest
import what_fits


def test_readme_has_the_planners_table() -> None:
    readme = what_fits.README.read_text()
    assert what_fits.place(readme, what_fits.render()) == readme


def test_a_readme_without_the_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"README\.md needs the lines .*what fits where: begin"):
        what_fits.place("no markers", "table")


def test_a_13b_model_fits_a_gpu_of_32_gib_with_128_gib_of_host() -> None:
    rows = [line.split("|")[1:-1] for line in what_fits.render().splitlines()[2:]]
    lean = {tuple(cell.strip() for cell in row[:3]): float(row[5]) for row in rows}
    assert lean["host", "host", "host"] >= 13
