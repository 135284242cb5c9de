"""Memory tiers: bytes in, bytes out, asynchronously."""

from hf_speed.offload.activations import ActivationOffload
from hf_speed.offload.device import DeviceStore
from hf_speed.offload.disk import DiskStore
from hf_speed.offload.host import HostStore
from hf_speed.offload.pool import StagingPool
from hf_speed.offload.store import DONE, Store, Ticket

__all__ = [
    "DONE",
    "ActivationOffload",
    "DeviceStore",
    "DiskStore",
    "HostStore",
    "StagingPool",
    "Store",
    "Ticket",
]
