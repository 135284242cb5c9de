"""What of an offload section takes effect, and what is refused because it would not."""

from typing import Any

import pytest

from hf_speed.config import ResolvedOffload, load_config, resolve
from hf_speed.errors import ConfigError

DEVICE = {"optimizer": "device", "gradients": "device", "parameters": "device"}
DISK = {"optimizer": "disk", "paths": ["/fast/a", "/fast/b"]}


def _resolved(*, device_type: str = "cuda", **offload: Any) -> ResolvedOffload:
    config = load_config({"zero": {"stage": 3}, "offload": offload})
    return resolve(config, world_size=4, device_type=device_type).offload


def test_nothing_leaves_the_device_unasked() -> None:
    resolved = _resolved()
    assert resolved.tiers == ("device", "device", "device", "device")
    assert not resolved.moves
    assert resolved.rows() == []
    assert resolved.update == "torch"


@pytest.mark.parametrize("kind", ["optimizer", "gradients", "parameters", "activations"])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_tiers_are_those_that_are_set(kind: str, tier: str) -> None:
    resolved = _resolved(**{kind: tier}, paths=["/fast"])
    assert getattr(resolved, kind) == tier
    assert resolved.moves
    assert resolved.paths == (("/fast",) if tier == "disk" else ())
    assert (f"offload.{kind}", tier) in [row[:2] for row in resolved.rows()]


def test_the_rest_passes_through() -> None:
    resolved = _resolved(
        **DISK,
        activations="host",
        staging_bytes=1 << 25,
        update="fused",
        moments="int8",
        step="speculative",
        cpu_share=0.25,
        activation_min_bytes=4096,
    )
    assert resolved.staging_bytes == 1 << 25
    assert (resolved.update, resolved.moments, resolved.step) == ("fused", "int8", "speculative")
    assert (resolved.cpu_share, resolved.activation_min_bytes) == (0.25, 4096)
    assert [row[:2] for row in resolved.rows()] == [
        ("offload.optimizer", "disk"),
        ("offload.gradients", "device"),
        ("offload.parameters", "device"),
        ("offload.activations", "host"),
        ("offload.paths", "/fast/a, /fast/b"),
        ("offload.staging_bytes", "33554432"),
        ("offload.update", "fused"),
        ("offload.step", "speculative"),
        ("offload.moments", "int8"),
        ("offload.cpu_share", "0.25"),
        ("offload.activation_min_bytes", "4096"),
    ]


def test_rows_of_offload_stand_in_the_whole_table() -> None:
    config = load_config({"zero": {"stage": 1}, "offload": {"optimizer": "host"}})
    table = resolve(config, world_size=1).table()
    assert "offload.optimizer" in table
    assert "offload" not in resolve(load_config({"zero": {"stage": 1}}), world_size=1).table()


def test_a_delayed_step_says_what_it_changes() -> None:
    resolved = _resolved(optimizer="host", step="delayed")
    assert ("offload.step", "delayed", "one step late: the trajectory is another one") in (
        resolved.rows()
    )


@pytest.mark.parametrize(
    ("offload", "update"),
    [
        ({}, "torch"),
        ({"optimizer": "host"}, "auto"),
        ({"optimizer": "host", "update": "torch"}, "torch"),
        ({"optimizer": "host", "update": "fused"}, "fused"),
        ({"update": "fused"}, "fused"),
        ({"moments": "bfloat16"}, "fused"),
        ({"optimizer": "host", "moments": "int8"}, "fused"),
    ],
)
def test_update_is_the_kernels_where_the_state_moves(offload: dict[str, Any], update: str) -> None:
    assert _resolved(**offload).update == update


def test_an_open_optimizer_that_stays_on_the_device_steps_after_the_backward() -> None:
    assert _resolved(step="delayed").step == "after"
    assert _resolved(optimizer="host", step="delayed").step == "delayed"


@pytest.mark.parametrize(
    ("offload", "message"),
    [
        ({"gradients": "disk"}, r"offload\.gradients='disk' needs a place: set offload\.paths"),
        ({"activations": "disk"}, r"offload\.activations='disk' needs a place"),
        (
            {**DEVICE, "paths": ["/fast"]},
            r"paths=\('/fast',\) takes no effect: no tier is 'disk' and none is left open",
        ),
        (
            {**DEVICE, "optimizer": "host", "paths": ["/fast"]},
            r"Remove offload\.paths, or set a tier to 'disk'",
        ),
        ({**DEVICE, "staging_bytes": 1 << 25}, r"staging_bytes=33554432 .*every tier is 'device'"),
        ({**DEVICE, "host_bytes": 1 << 30}, r"host_bytes=1073741824 .*or leave one of the tiers"),
        (
            {"optimizer": "host", "update": "torch", "moments": "int8"},
            r"moments='int8' takes no effect: offload\.update='torch'.*update='fused'",
        ),
        (
            {"optimizer": "host", "update": "torch", "cpu_share": 0.5},
            r"cpu_share=0\.5 takes no effect: offload\.update='torch'",
        ),
        (
            {"optimizer": "device", "step": "speculative"},
            r"step='speculative' takes no effect: offload\.optimizer='device'.*'host' or 'disk'",
        ),
        ({"optimizer": "device", "cpu_share": 0.5}, r"cpu_share=0\.5 .*offload\.optimizer='dev"),
        (
            {"activation_min_bytes": 4096},
            r"activation_min_bytes=4096 takes no effect: activations stay on the device",
        ),
    ],
)
def test_what_takes_no_effect_is_refused(offload: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _resolved(**offload)


def test_an_update_is_shared_with_a_gpu_only() -> None:
    with pytest.raises(ConfigError, match=r"cpu_share=0\.5 takes no effect: no GPU computes here"):
        _resolved(optimizer="host", cpu_share=0.5, device_type="cpu")


def test_what_an_open_tier_may_come_to_need_is_not_refused() -> None:
    _resolved(paths=["/fast"], staging_bytes=1 << 25, host_bytes=1 << 30, step="speculative")
    _resolved(**{**DEVICE, "gradients": "host"}, staging_bytes=1 << 25)
    _resolved(**DEVICE, activations="disk", paths=["/fast"], activation_min_bytes=4096)
