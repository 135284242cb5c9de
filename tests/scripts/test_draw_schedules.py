"""The pictures and the table in the README of pipe/ are the renderer's and the simulator's."""

from pathlib import Path
from xml.etree import ElementTree as ET

import draw_schedules
import pytest

from hf_speed.pipe.schedules import SCHEDULES


def test_readme_has_the_renderers_grids_and_the_simulators_table() -> None:
    readme = draw_schedules.README.read_text()
    assert draw_schedules.place(readme, draw_schedules.render()) == readme


def test_every_schedule_is_in_the_table_and_drawn() -> None:
    text = draw_schedules.render()
    for name in SCHEDULES:
        assert f"| `{name}` |" in text
        assert f"`{name}`: bubble" in text


def test_a_readme_without_the_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"README\.md needs the lines .*schedules: begin"):
        draw_schedules.place("no markers", "table")


def test_every_schedule_is_an_svg(tmp_path: Path) -> None:
    draw_schedules.write_svgs(tmp_path)
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(SCHEDULES)
    for path in tmp_path.iterdir():
        assert ET.fromstring(path.read_text()).tag.endswith("svg")
