"""Pictures: the grid, the grid of a fault, the SVG."""

from xml.etree import ElementTree as ET

import pytest

from hf_speed.errors import ConfigError
from hf_speed.pipe.action import Action, Kind
from hf_speed.pipe.lower import lower
from hf_speed.pipe.render import fault, grid, svg
from hf_speed.pipe.schedules import SCHEDULES, make_plan
from hf_speed.pipe.simulate import Costs, simulate

SPACE = "{http://www.w3.org/2000/svg}"


def test_print_shows_ranks_and_time() -> None:
    plan = make_plan("1f1b", num_ranks=3, num_microbatches=4)
    assert str(plan) == (
        "rank 0  F0 F1 F2 .  .  .  .  B0 -- F3 B1 -- .  B2 -- .  B3 --\n"
        "rank 1  .  F0 F1 .  .  B0 -- F2 B1 -- F3 B2 -- .  B3 --\n"
        "rank 2  .  .  F0 B0 -- F1 B1 -- F2 B2 -- F3 B3 --"
    )


def test_a_rank_with_two_stages_names_them() -> None:
    plan = make_plan("zb_v", num_ranks=2, num_microbatches=3)
    assert str(plan) == (
        "rank 0  F0a F1a F2a F0b I0b W0b F1b I1b W1b I0a W0a F2b I2b I1a W2b I2a W1a W2a\n"
        "rank 1  .   F0a F0b F1a F1b I0b W0b F2a I0a W0a F2b I1b I1a I2b I2a W1b W1a W2b W2a"
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_idle_slots_are_what_the_simulator_says(name: str) -> None:
    plan = make_plan(name, num_ranks=4, num_microbatches=8)
    cells = [line.split()[2:] for line in str(plan).splitlines()]
    for row, busy, events in zip(cells, simulate(plan).busy, simulate(plan).events, strict=True):
        assert len(row) == events[-1].end
        assert len(row) - row.count(".") == busy


def test_a_slot_is_the_shortest_action() -> None:
    plan = make_plan("gpipe", num_ranks=2, num_microbatches=1)
    picture = grid(plan, Costs(forward=0.5, backward=1.0, hop=0.5))
    assert picture == "rank 0  F0 .  .  .  .  .  B0 --\nrank 1  .  .  F0 B0 --"


def test_a_lowered_plan_shows_its_order() -> None:
    plan = lower(make_plan("1f1b", num_ranks=2, num_microbatches=1), shard="step")
    assert str(plan) == ("rank 0  US  F0  SF0 RB0 B0  RS  RD\nrank 1  US  RF0 F0  B0  SB0 RS  RD")


def test_a_fault_marks_its_action_and_shows_its_neighbourhood() -> None:
    plan = make_plan("1f1b", num_ranks=2, num_microbatches=30)
    action = Action(Kind.FORWARD, 1, 12)
    head, first, second = fault(plan, "why", rank=1, action=action).splitlines()
    assert head == "The plan '1f1b' cannot run: why."
    assert ">F12<" in second
    assert ">" not in first
    assert first.split()[2] == second.split()[2] == "..."
    assert first.endswith("...")
    assert len(second.split()) == 2 + 2 + 17


def test_a_fault_of_something_missing_marks_nothing() -> None:
    plan = make_plan("1f1b", num_ranks=2, num_microbatches=1)
    assert fault(plan, "why", rank=0, action=None).endswith("\nrank 0  F0 B0\nrank 1  F0 B0")


@pytest.mark.parametrize("name", ["1f1b", "zb_v"])
def test_svg_has_a_box_for_every_action(name: str) -> None:
    plan = make_plan(name, num_ranks=3, num_microbatches=5)
    root = ET.fromstring(svg(plan))
    titles = [box.findtext(f"{SPACE}title") for box in root.iter(f"{SPACE}rect")]
    assert sorted(filter(None, titles)) == sorted(str(action) for _, action in plan.actions())
    texts = {text.text for text in root.iter(f"{SPACE}text")}
    assert {"rank 0", "rank 1", "rank 2", "4"} <= texts
    assert any(text and text.startswith("F forward") for text in texts)
    assert ("paler: the later stages of a rank" in texts) == (name == "zb_v")


def test_svg_is_to_scale() -> None:
    plan = make_plan("gpipe", num_ranks=1, num_microbatches=1)
    root = ET.fromstring(svg(plan, Costs(forward=1.0, backward=2.5)))
    widths = [
        float(box.get("width", ""))
        for box in root.iter(f"{SPACE}rect")
        if box.find(f"{SPACE}title") is not None
    ]
    assert widths[1] / widths[0] == 2.5


def test_a_plan_that_deadlocks_has_no_picture_but_its_fault() -> None:
    plan = make_plan("1f1b", num_ranks=2, num_microbatches=1).keep(Kind.BACKWARD)
    with pytest.raises(ConfigError, match=r"\n.*>B0<"):
        str(plan)
