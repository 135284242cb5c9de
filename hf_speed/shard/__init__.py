"""Where each element of each parameter lives."""

from hf_speed.shard.layout import FlatLayout, Slot, SlotPiece

__all__ = ["FlatLayout", "Slot", "SlotPiece"]
