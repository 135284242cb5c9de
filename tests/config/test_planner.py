"""The first plan that fits is taken; where none does, the error shows every one that was tried."""

from typing import Any

import pytest

from hf_speed.config import Memory, TierBytes, Tiers, load_config
from hf_speed.config.planner import Choice, candidates, choose
from hf_speed.errors import ConfigError

GIB = 1 << 30


def _needed(stage: int, tiers: Tiers) -> TierBytes:
    """A model with 12, 4 and 2 GiB of optimizer, gradients and parameters over 4 ranks."""
    amounts = {"device": GIB, "host": 0, "disk": 0}
    whole = (12, 4, 2)
    for tier, of_kind, first in zip(tiers, whole, (1, 2, 3), strict=True):
        amounts[tier] += of_kind * GIB // (4 if stage >= first else 1)
    return TierBytes(**amounts)


def _chosen(memory: Memory, **tree: Any) -> Choice:
    return choose(load_config(tree), needed=_needed, memory=memory)


def _gib(device: float, host: float = 0, disk: float = 0, *, shared: bool = False) -> Memory:
    return Memory(int(device * GIB), int(host * GIB), int(disk * GIB), shared=shared)


@pytest.mark.parametrize(
    ("memory", "stage", "tiers"),
    [
        (_gib(25, 64), 0, ("device", "device", "device")),
        (_gib(13, 64), 1, ("device", "device", "device")),
        (_gib(7.5, 64), 3, ("device", "device", "device")),
        # What is sharded further goes before what leaves the device.
        (_gib(6.25, 64), 2, ("host", "device", "device")),
        (_gib(4, 64), 3, ("host", "device", "device")),
        (_gib(3, 64), 3, ("host", "host", "device")),
        (_gib(1.5, 64), 0, ("host", "host", "host")),
        (_gib(1.5, 9), 1, ("host", "host", "host")),
    ],
)
def test_the_fastest_plan_that_fits(memory: Memory, stage: int, tiers: tuple[str, ...]) -> None:
    choice = _chosen(memory)
    assert (choice.stage, choice.tiers) == (stage, tiers)


def test_disk_is_used_only_where_paths_are() -> None:
    with pytest.raises(ConfigError, match="No plan fits"):
        _chosen(_gib(2, 1, 64))
    choice = _chosen(_gib(2, 1, 64), offload={"paths": ["/fast"]})
    assert choice.tiers == ("disk", "host", "device")
    assert _chosen(_gib(1.5, 0, 64), offload={"paths": ["/fast"]}).tiers == ("disk",) * 3


def test_what_is_set_stays() -> None:
    choice = _chosen(_gib(100, 64), zero={"stage": 2}, offload={"parameters": "host"})
    assert (choice.stage, choice.tiers) == (2, ("device", "device", "host"))
    assert choice.stage_reason == "set"
    assert choice.tiers_reason == "auto: 5.00 GiB a rank fit in 80.00 of 100.00 GiB"
    assert _chosen(_gib(100, 64), offload={"parameters": "host"}).tiers_reason == (
        "auto, with the stage"
    )


def test_where_nothing_is_open_all_of_the_device_may_be_filled() -> None:
    tiers = {"optimizer": "device", "gradients": "device", "parameters": "device"}
    choice = _chosen(_gib(19), zero={"stage": 0}, offload=tiers)
    assert (choice.stage_reason, choice.tiers_reason) == ("set", "set")
    text = _refusal(_gib(18.99), zero={"stage": 0}, offload=tiers)
    assert "device 18.99 of 18.99" in text
    assert "leave tiers out of offload, to have them chosen" in text
    # Where a choice was left open, a fifth stays free.
    assert "device 15.20 of 19.00" in _refusal(_gib(19), zero={"stage": 0})


def _refusal(memory: Memory, **tree: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        _chosen(memory, **tree)
    return str(caught.value)


def test_cpu_has_one_memory_and_host_is_not_tried() -> None:
    tried = list(candidates(load_config({}).offload, shared=True))
    assert tried == [("device", "device", "device")]
    with_disk = list(candidates(load_config({"offload": {"paths": ["a"]}}).offload, shared=True))
    assert [tiers.count("disk") for tiers in with_disk] == [0, 1, 2, 3]
    asked = list(candidates(load_config({"offload": {"optimizer": "host"}}).offload, shared=True))
    assert asked == [("host", "device", "device")]
    # Bytes on host and device add up there.
    assert _chosen(_gib(24, shared=True), offload={"optimizer": "host"}).stage == 0
    assert _chosen(_gib(23, shared=True), offload={"optimizer": "host"}).stage == 1


def test_host_bytes_bound_the_cpu() -> None:
    offload = {"paths": ["/fast"]}
    memory = _gib(100, 0, 64, shared=True)
    assert _chosen(memory, offload=offload).tiers.count("disk") == 0
    small = {**offload, "host_bytes": 3 * GIB}
    assert _chosen(memory, zero={"stage": 0}, offload=small).tiers == ("disk", "disk", "device")
    assert "fit in 3.00 of 100.00 GiB" in _chosen(memory, offload=small).stage_reason


def test_nothing_fits_shows_every_plan_against_what_there_is() -> None:
    text = _refusal(_gib(1, 2), zero={"stage": 2})
    assert "may be filled: device 0.80 of 1.00, host 2.00, disk 0" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("  2")]
    assert rows == [
        ["2", "device", "device", "device", "7.00!", "0", "0"],
        ["2", "host", "device", "device", "4.00!", "3.00!", "0"],
        ["2", "host", "host", "device", "3.00!", "4.00!", "0"],
        ["2", "host", "host", "host", "1.00!", "6.00!", "0"],
    ]
    for help_ in ("zero.stage=3", "add ranks", "offload.paths", "'int8'", "requires_grad_(False)"):
        assert help_ in text
    assert len([line for line in _refusal(_gib(1, 2)).splitlines() if line[2:3].isdigit()]) == 16


def test_nothing_fits_on_a_cpu_speaks_of_one_memory() -> None:
    text = _refusal(_gib(1, shared=True))
    assert "may be filled: device and host together 0.80 of 1.00, disk 0" in text
    assert len([line for line in text.splitlines() if line[2:3].isdigit()]) == 4
