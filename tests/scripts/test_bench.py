"""The benches' bars, records and tables, and that all systems of a bench train the same model."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import common
import pytest
import tables

BENCH = Path(common.__file__).parent


@pytest.mark.parametrize(
    ("ratio", "bar", "holds"),
    [
        (1.25, ">=1.25", True),
        (1.249, ">=1.25", False),
        (1.02, "<=1.02", True),
        (1.03, "<=1.02", False),
        (0.981, "1+-0.02", True),
        (1.021, "1+-0.02", False),
        (0.0, None, True),
    ],
)
def test_a_bar_is_judged_on_the_ratio(ratio: float, bar: str | None, holds: bool) -> None:  # noqa: FBT001
    assert common.judge(ratio, bar) is holds


def test_a_bar_in_another_form_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"bar '>1' is not of the form"):
        common.judge(1.0, ">1")


def _row(*, bar: str | None) -> common.Row:
    return common.make_row(
        "a claim", "Llama", ours=3.0, peer="ddp", theirs=2.0, unit="tokens/s",
        ratios=[1.6, 1.4, 1.5], bar=bar,
    )  # fmt: skip


def test_a_row_takes_the_median_of_the_rounds_and_their_spread() -> None:
    row = _row(bar=">=1.5")
    assert row.ratio == 1.5
    assert row.holds
    assert row.runs == 3
    assert row.spread == pytest.approx(0.2 / 1.5)


@pytest.mark.parametrize(
    ("bar", "complete", "code"),
    [(">=1.5", True, 0), (">=1.6", True, 1), (None, True, 0), (">=1.5", False, 1)],
)
def test_a_bench_exits_0_only_if_it_was_complete_and_every_bar_holds(
    tmp_path: Path, bar: str | None, complete: bool, code: int  # noqa: FBT001
) -> None:  # fmt: skip
    path = tmp_path / "record.json"
    args = Namespace(json=path, out=None, bench="a_bench", quick=True)
    assert common.finish([_row(bar=bar)], args, complete=complete) == code
    record = json.loads(path.read_text())
    assert record["complete"] is complete
    assert set(record["rows"][0]) == {
        "claim", "shape", "ours", "peer", "theirs", "unit", "ratio", "bar", "holds", "runs",
        "spread",
    }  # fmt: skip
    assert {"commit", "versions", "device"} <= set(record)


def test_rounds_alternate_their_order() -> None:
    called: list[str] = []

    def runner(name: str) -> float:
        called.append(name)
        return 1.0

    runners = {"a": lambda: runner("a"), "b": lambda: runner("b")}
    found = common.interleave(runners, rounds=2, say=lambda _: None)
    assert called == ["a", "b", "b", "a"]
    assert found == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_tables_show_a_row_that_missed_and_replace_what_was_there(tmp_path: Path) -> None:
    args = Namespace(json=tmp_path / "x.json", out=None, bench="a_bench", quick=False)
    common.finish([_row(bar=">=1.6")], args)
    readme = f"top\n{tables.BEGIN}\nstale text\n{tables.END}\nbottom\n"
    placed = tables.place(readme, tables.render_all(tmp_path))
    assert "| **no** |" in placed
    assert "stale text" not in placed
    assert placed.startswith("top\n")
    assert placed.endswith("bottom\n")


def test_tables_without_their_markers_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"README\.md needs the lines"):
        tables.place("no markers", "tables")


def test_the_readme_shows_the_committed_results() -> None:
    readme = tables.REPO / "README.md"
    assert tables.place(readme.read_text(), tables.render_all(tables.RESULTS)) == readme.read_text()


TRAIN_ALL = """
import json, sys
import workers
from workload import Shape
shape = Shape(vocab=64, hidden=32, inter=48, layers=2, heads=2, batch=2, length=8)
names = ["ddp", "fsdp2", "ours-0", "ours-1", "ours-2", "ours-3"]
with workers.groups([workers.Job(name, shape, "float32", 2) for name in names]) as groups:
    print(json.dumps({name: [a[2] for a in g.call("steps", 4)] for name, g in groups.items()}))
"""


def test_all_systems_of_a_bench_train_the_same_model_on_the_same_batch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_ALL], cwd=BENCH, capture_output=True, text=True, check=False,
        env={"PATH": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{BENCH}:{tables.REPO}"},
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = json.loads(done.stdout.splitlines()[-1])
    for name, values in losses.items():
        assert values == pytest.approx(losses["ddp"], rel=1e-5), name
