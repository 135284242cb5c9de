"""Schedules as pure functions: (ranks, microbatches, stages a rank, costs) -> Plan."""

from hf_speed.pipe.schedules.registry import SCHEDULES, make_plan

__all__ = ["SCHEDULES", "make_plan"]
