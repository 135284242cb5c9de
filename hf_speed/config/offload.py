"""OffloadConfig -> ResolvedOffload: which tier holds what, and what of a config takes effect.

Pure, like `resolve`, which calls it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from hf_speed.config.planner import Tiers
from hf_speed.config.tree import OffloadConfig, Tier
from hf_speed.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedOffload:
    """An offload section with nothing left open that is known before the optimizer is."""

    optimizer: Tier
    """Tier of the moments, and of masters that are a copy."""
    gradients: Tier
    """Tier of the gradients that wait for the step."""
    parameters: Tier
    """Tier of the parameters while they do not compute."""
    activations: Tier
    """Tier of what the forward saves for the backward."""
    paths: tuple[str, ...]
    """Directories of the disk tier; none where no tier is 'disk'."""
    staging_bytes: int
    """Host memory through which chunks move."""
    update: Literal["torch", "fused", "auto"]
    """What updates. 'auto': the kernel if it has a rule for the optimizer, which comes later."""
    moments: Literal["float32", "bfloat16", "int8"]
    """Dtype in which the kernel keeps the moments."""
    step: Literal["after", "speculative", "delayed"]
    """When the update runs; 'after' where the optimizer's state is on the device."""
    cpu_share: float
    """Share of each update that the CPU does; 1 where no GPU computes."""
    activation_min_bytes: int
    """Smallest saved activation that moves."""
    reason: str
    """Why these tiers: 'set', or how they were chosen."""

    @property
    def tiers(self) -> tuple[Tier, Tier, Tier, Tier]:
        """Of optimizer, gradients, parameters and activations."""
        return self.optimizer, self.gradients, self.parameters, self.activations

    @property
    def moves(self) -> bool:
        """Whether anything lives off the device."""
        return any(tier != "device" for tier in self.tiers)

    def rows(self) -> list[tuple[str, str, str]]:
        """(config path, value, why) as in `ResolvedConfig.rows`; none where nothing moves."""
        if not self.moves:
            return []
        when = {
            "after": "in optimizer.step()",
            "speculative": "during the backward, rolled back if clipping says so",
            "delayed": "one step late: the trajectory is another one",
        }
        rows = [
            ("offload.optimizer", self.optimizer, f"moments and masters; {self.reason}"),
            ("offload.gradients", self.gradients, "while they wait for the step"),
            ("offload.parameters", self.parameters, "while they do not compute"),
            ("offload.activations", self.activations, "saved for the backward"),
            ("offload.staging_bytes", str(self.staging_bytes), "host memory that chunks pass"),
            ("offload.update", self.update, _UPDATES[self.update]),
            ("offload.step", self.step, when[self.step]),
        ]
        if self.paths:
            rows.insert(4, ("offload.paths", ", ".join(self.paths), "striped"))
        if self.update != "torch":
            rows.append(("offload.moments", self.moments, "as the kernel keeps them"))
        if self.cpu_share != 1.0:
            rows.append(("offload.cpu_share", f"{self.cpu_share:g}", "of each update, on the CPU"))
        if self.activations != "device":
            value = str(self.activation_min_bytes)
            rows.append(("offload.activation_min_bytes", value, "smaller ones stay"))
        return rows


_UPDATES = {
    "torch": "your optimizer, chunk by chunk",
    "fused": "one pass of hf_speed's kernel",
    "auto": "one pass of hf_speed's kernel if it knows the optimizer",
}


def resolve_offload(offload: OffloadConfig, *, tiers: Tiers, reason: str) -> ResolvedOffload:
    """Make every choice that `offload` leaves open.

    Args:
        offload: what the user set, checked by `check_offload`.
        tiers: as chosen.
        reason: why.
    """
    activations = offload.activations or "device"
    return ResolvedOffload(
        optimizer=tiers.optimizer,
        gradients=tiers.gradients,
        parameters=tiers.parameters,
        activations=activations,
        paths=offload.paths if "disk" in (*tiers, activations) else (),
        staging_bytes=offload.staging_bytes,
        update=update_of(offload, tiers.optimizer),
        moments=offload.moments,
        step="after" if tiers.optimizer == "device" else offload.step,
        cpu_share=offload.cpu_share,
        activation_min_bytes=offload.activation_min_bytes,
        reason=reason,
    )


def update_of(offload: OffloadConfig, optimizer: Tier) -> Literal["torch", "fused", "auto"]:
    """What updates an optimizer whose state is on this tier."""
    if offload.update is not None:
        return offload.update
    if offload.moments != "float32":
        return "fused"  # Only the kernel keeps moments so; an optimizer without a rule is refused.
    return "torch" if optimizer == "device" else "auto"


class Refusal(NamedTuple):
    """Fields that take no effect, in what case, and what to do about it."""

    names: tuple[str, ...]
    because: str
    instead: str


def check_offload(offload: OffloadConfig, *, device_type: str) -> None:
    """Raise ConfigError where a value cannot take effect beside the others.

    A tier that is left open may become any: what depends on it is not refused.
    """
    kinds = ("optimizer", "gradients", "parameters", "activations")
    on_disk = [kind for kind in kinds if getattr(offload, kind) == "disk"]
    if on_disk and not offload.paths:
        raise ConfigError(
            f"offload.{on_disk[0]}='disk' needs a place: set offload.paths to one or more "
            "directories, each on a fast local disk."
        )
    default = OffloadConfig()
    for refusal in _refusals(offload, device_type=device_type):
        for name in refusal.names:
            value = getattr(offload, name)
            if value != getattr(default, name):
                raise ConfigError(
                    f"offload.{name}={value!r} takes no effect: {refusal.because}. Remove "
                    f"offload.{name}{refusal.instead}."
                )


def _refusals(offload: OffloadConfig, *, device_type: str) -> Iterator[Refusal]:
    """Every refusal that holds for the tiers, the update and the device."""
    if device_type == "cpu":
        yield Refusal(("cpu_share",), "no GPU computes here that could share the update", "")
    if offload.optimizer == "device":
        yield Refusal(
            ("step", "cpu_share"),
            "offload.optimizer='device' keeps the optimizer's state where it is",
            ", or set offload.optimizer to 'host' or 'disk'",
        )
    if offload.update == "torch":
        yield Refusal(
            ("moments", "cpu_share"),
            "offload.update='torch' lets your optimizer update, not hf_speed's kernel",
            ", or set offload.update='fused'",
        )
    # Activations move only if told to; the other tiers may, where left open.
    may_move = {offload.optimizer, offload.gradients, offload.parameters} - {"device"}
    activations_move = offload.activations not in (None, "device")
    if not activations_move:
        yield Refusal(
            ("activation_min_bytes",),
            "activations stay on the device",
            ", or set offload.activations to 'host' or 'disk'",
        )
    if not (may_move or activations_move):
        yield Refusal(
            ("staging_bytes", "host_bytes"),
            "every tier is 'device'",
            ", or leave one of the tiers out",
        )
    if not ("disk" in may_move or None in may_move or offload.activations == "disk"):
        yield Refusal(
            ("paths",),
            "no tier is 'disk' and none is left open",
            ", or set a tier to 'disk'",
        )
