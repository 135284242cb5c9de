"""Which stage and which tiers: what is left open becomes the first plan that fits.

Plans are tried from the fastest on: everything on the device at stages 0 to 3, then the optimizer
on the host at stages 0 to 3, and so on down LADDER. Pure: bytes come in as arguments.

Source: ZeRO-Offload, arXiv:2101.06840, section 3 (what to move first: it is read and written once
a step); ZeRO-Infinity, arXiv:2104.07857, section 5.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from hf_speed.config.tree import GIB, OffloadConfig, SpeedConfig, Tier
from hf_speed.errors import ConfigError

MEMORY_SHARE = 0.8
"""Share of the device that model states may fill; the rest is for activations."""


class Tiers(NamedTuple):
    """The tier of each kind of model state."""

    optimizer: Tier
    gradients: Tier
    parameters: Tier


ON_DEVICE = Tiers("device", "device", "device")

LADDER: tuple[Tiers, ...] = (
    ON_DEVICE,
    Tiers("host", "device", "device"),
    Tiers("host", "host", "device"),
    Tiers("host", "host", "host"),
    Tiers("disk", "device", "device"),
    Tiers("disk", "host", "device"),
    Tiers("disk", "host", "host"),
    Tiers("disk", "disk", "host"),
    Tiers("disk", "disk", "disk"),
)
"""What is tried, fastest first. Where device and host are one memory, 'host' gives way to
'device': it would only copy."""


class TierBytes(NamedTuple):
    """Bytes of one rank on each tier."""

    device: int
    host: int
    disk: int


class Memory(NamedTuple):
    """What there is for one rank, in bytes.

    Attributes:
        device: all of the device; where it is a CPU, this rank's share of the machine's memory.
        host: what the plan may fill besides.
        disk: what is free in `offload.paths`.
        shared: the device is the CPU: device and host are one memory, of `device` bytes.
    """

    device: int
    host: int = 0
    disk: int = 0
    shared: bool = False


Needed = Callable[[int, Tiers], TierBytes]
"""From a stage and tiers to the bytes that one rank needs (`engine.estimate`)."""


class Choice(NamedTuple):
    """A stage and tiers, each with the reason why."""

    stage: int
    stage_reason: str
    tiers: Tiers
    tiers_reason: str


class _Tried(NamedTuple):
    stage: int
    tiers: Tiers
    needed: TierBytes


def choose(config: SpeedConfig, *, needed: Needed | None, memory: Memory | None) -> Choice:
    """The first plan that fits, of those that the config allows.

    Args:
        config: what the user set; a stage and tiers that are set are the only ones tried.
        needed: bytes per rank of a plan. Without it nothing is compared, and tiers that are left
            open are the device.
        memory: what there is.

    Raises:
        ConfigError: no plan fits; or the stage is left open and nothing is known to choose it by.
    """
    stage = config.zero.stage
    if needed is None or memory is None:
        if stage is None:
            raise ConfigError(
                "zero.stage is left open, but the memory to plan for is unknown. Set zero.stage to "
                "0, 1, 2 or 3."
            )
        return Choice(stage, "set", _filled(config.offload, ON_DEVICE), "set")
    is_open = stage is None or _is_open(config.offload)
    limits = limits_of(config.offload, memory, is_open=is_open)
    tried: list[_Tried] = []
    for tiers in candidates(config.offload, shared=memory.shared):
        for each in (0, 1, 2, 3) if stage is None else (stage,):
            found = _Tried(each, tiers, needed(each, tiers))
            if _fits(found.needed, limits, shared=memory.shared):
                return _choice(config, found, limits, memory=memory, num_tried=len(tried) + 1)
            tried.append(found)
    raise ConfigError(_refusal(config, tried, memory=memory, limits=limits))


def candidates(offload: OffloadConfig, *, shared: bool) -> Iterator[Tiers]:
    """What the config allows of LADDER, in its order, each once."""
    seen = set()
    for rung in LADDER:
        tiers = Tiers(*("device" if shared and tier == "host" else tier for tier in rung))
        pairs = zip(tiers, _set_tiers(offload), strict=True)
        opens_disk = any(tier == "disk" and fixed is None for tier, fixed in pairs)
        filled = _filled(offload, tiers)
        if filled not in seen and (offload.paths or not opens_disk):
            seen.add(filled)
            yield filled


def _set_tiers(offload: OffloadConfig) -> tuple[Tier | None, Tier | None, Tier | None]:
    return offload.optimizer, offload.gradients, offload.parameters


def _is_open(offload: OffloadConfig) -> bool:
    return None in _set_tiers(offload)


def _filled(offload: OffloadConfig, tiers: Tiers) -> Tiers:
    """`tiers`, but for those that the user set."""
    pairs = zip(_set_tiers(offload), tiers, strict=True)
    return Tiers(*(fixed if fixed is not None else tier for fixed, tier in pairs))


def limits_of(offload: OffloadConfig, memory: Memory, *, is_open: bool) -> TierBytes:
    """What a plan may fill of each tier; all of the device where the user left no choice."""
    share = MEMORY_SHARE if is_open else 1.0
    device = int(share * memory.device)
    if memory.shared and offload.host_bytes is not None:
        device = min(device, offload.host_bytes)
    return TierBytes(device, memory.host, memory.disk)


def _fits(needed: TierBytes, limits: TierBytes, *, shared: bool) -> bool:
    if shared:
        return needed.device + needed.host <= limits.device and needed.disk <= limits.disk
    return all(need <= limit for need, limit in zip(needed, limits, strict=True))


def _choice(
    config: SpeedConfig, found: _Tried, limits: TierBytes, *, memory: Memory, num_tried: int
) -> Choice:
    of_device = found.needed.device + (found.needed.host if memory.shared else 0)
    why = (
        f"auto: {_gib(of_device)} GiB a rank fit in {_gib(limits.device)} of "
        f"{_gib(memory.device)} GiB"
    )
    if num_tried > 1:
        why += f", the first of {num_tried} plans that does"
    stage_reason, tiers_reason = "set", "set"
    if config.zero.stage is None:
        stage_reason = why
        tiers_reason = "auto, with the stage" if _is_open(config.offload) else "set"
    elif _is_open(config.offload):
        tiers_reason = why
    return Choice(found.stage, stage_reason, found.tiers, tiers_reason)


def _refusal(
    config: SpeedConfig, tried: Sequence[_Tried], *, memory: Memory, limits: TierBytes
) -> str:
    """Why nothing fits: every plan tried, against what there is; and what to do."""
    advice = []
    if config.zero.stage not in (None, 3):
        advice.append("set zero.stage=3")
    advice.append("add ranks")
    if _is_open(config.offload) and not config.offload.paths:
        advice.append("set offload.paths to directories on fast local disks")
    if not _is_open(config.offload):
        advice.append("leave tiers out of offload, to have them chosen")
    if config.offload.moments == "float32":
        advice.append("set offload.moments to 'bfloat16' or 'int8'")
    if config.precision.accumulate_dtype == "float32":
        advice.append("set precision.accumulate_dtype='same'")
    advice.append("freeze what is not trained (requires_grad_(False))")
    what = "device and host together" if memory.shared else "device"
    there = f"{what} {_gib(limits.device)} of {_gib(memory.device)}"
    if not memory.shared:
        there += f", host {_gib(limits.host)}"
    return (
        f"No plan fits this model. GiB per rank that may be filled: {there}, disk "
        f"{_gib(limits.disk)}; activations come on top. Needed:\n"
        f"{_tried_table(tried, limits, shared=memory.shared)}\n"
        f"What may help: {'; '.join(advice)}."
    )


def _tried_table(tried: Sequence[_Tried], limits: TierBytes, *, shared: bool) -> str:
    lines = ["  stage  optimizer  gradients  parameters     device       host       disk"]
    for each in tried:
        amounts = TierBytes(*each.needed)
        over = [need > limit for need, limit in zip(amounts, limits, strict=True)]
        if shared:
            over = [sum(amounts[:2]) > limits.device] * 2 + over[2:]
        numbers = "  ".join(
            f"{_gib(amount):>8}{'!' if too_much else ' '}"
            for amount, too_much in zip(amounts, over, strict=True)
        )
        tiers = each.tiers
        lines.append(
            f"  {each.stage:<5}  {tiers.optimizer:<9}  {tiers.gradients:<9}  "
            f"{tiers.parameters:<10}  {numbers}".rstrip()
        )
    return "\n".join([*lines, "  (!: more than there is)"])


def _gib(num_bytes: int) -> str:
    """GiB, two decimals; more where those would be noughts."""
    return f"{num_bytes / GIB:.2f}" if num_bytes * 100 > GIB else f"{num_bytes / GIB:.2g}"
