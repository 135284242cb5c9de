"""The environment comes in as typed values, is read anew each time, and wrong values are named."""

import os
from pathlib import Path

import pytest

from hf_speed.config import env
from hf_speed.errors import ConfigError

WORLD = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    env.WORLD_VARIABLE,
    env.CONFIG_VARIABLE,
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WORLD:
        monkeypatch.delenv(name, raising=False)


def test_a_process_started_by_hand_is_a_world_of_one() -> None:
    assert env.launched_world() == env.LaunchedWorld(0, 1, 0, 1, launched=False)
    assert env.current_rank() == 0
    assert env.config_text() is None
    env.check_promised_world()


def test_launcher_variables_are_read_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("RANK", "5"),
        ("WORLD_SIZE", "8"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "4"),
    ):
        monkeypatch.setenv(name, value)
    assert env.launched_world() == env.LaunchedWorld(5, 8, 1, 4, launched=True)
    assert env.current_rank() == 5
    monkeypatch.setenv("RANK", "6")
    assert env.current_rank() == 6


def test_wrong_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="variable RANK='first' is not a whole number"):
        env.launched_world()
    assert env.current_rank() == 0
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"RANK=3 does not lie in 0\.\.1"):
        env.launched_world()


def test_another_world_than_promised_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.WORLD_VARIABLE, "2")
    with pytest.raises(ConfigError, match=r"=2 processes were asked for, but.*WORLD_SIZE=1"):
        env.check_promised_world()
    monkeypatch.setenv("WORLD_SIZE", "2")
    env.check_promised_world()


def test_overridden_puts_the_old_values_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLOUR", "red")

    def fail() -> None:
        with env.overridden({"COLOUR": "blue", env.CONFIG_VARIABLE: "{}"}):
            assert os.environ["COLOUR"] == "blue"
            assert env.config_text() == "{}"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert os.environ["COLOUR"] == "red"
    assert env.config_text() is None


def test_machine_has_cores_and_memory() -> None:
    assert 1 <= env.num_cores() <= (os.cpu_count() or 1)
    assert env.host_memory_bytes() > 1 << 28
    assert 1 << 20 < env.free_host_bytes() < env.host_memory_bytes()


def test_free_memory_is_the_control_groups_where_that_is_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env, "CONTROL_GROUP", tmp_path)
    assert not list(tmp_path.iterdir())
    everything = env.free_host_bytes()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("70000000\n")
    assert env.free_host_bytes() == pytest.approx(everything, rel=0.2)
    (tmp_path / "memory.max").write_text("100000000\n")
    assert env.host_memory_bytes() == 100_000_000
    assert env.free_host_bytes() == 30_000_000
    # Cached files give way.
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 5000000\n")
    assert env.free_host_bytes() == 35_000_000
    (tmp_path / "memory.current").write_text("200000000\n")
    assert env.free_host_bytes() == 0
