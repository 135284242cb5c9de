"""The bench that kills saves: a few kills, and that it sees what is lost."""

from pathlib import Path

import checkpoint_kills as kills
import torch

from tests.support import run_ranks


def _some(directory: str, names: list[tuple[str, int]], num_trials: int) -> list[list[bool]]:
    torch.set_num_threads(1)
    kills.prepare()
    rows = []
    for system in kills.systems():
        if (system.name, system.ranks) in names:
            home = Path(directory) / f"{system.name}-{system.ranks}"
            outcomes = kills.run_trials(
                system, home, num_trials, seed=1, num_timed=3, say=lambda _: None
            )
            rows.append([row.holds for row in kills.rows_of(system, outcomes)[:3]])
    return rows


def test_a_run_killed_while_it_saves_goes_on_from_the_last_save(tmp_path: Path) -> None:
    """At once and behind, on one process; the bench itself does hundreds, on two as well."""
    names = [("at once", 1), ("behind the training", 1)]
    rows = run_ranks(_some, 1, str(tmp_path), names, 4, backend=None, timeout_s=100)[0]
    assert rows == [[True] * 3] * 2


def test_what_is_lost_or_older_or_different_does_not_hold() -> None:
    system = kills.systems()[0]
    good = kills.Outcome(resumed=True, complete=3, step=4, exact=True, within=True)
    assert all(row.holds for row in kills.rows_of(system, [good, good]))
    for bad in (
        good._replace(resumed=False, step=-1, exact=False),
        good._replace(step=2),
        good._replace(exact=False),
    ):
        assert not all(row.holds for row in kills.rows_of(system, [good, bad]))
    missed = [good._replace(within=False)] * 2
    assert [row.holds for row in kills.rows_of(system, missed)] == [True, True, True, False]
