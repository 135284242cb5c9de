"""hf_speed behind `accelerate.Accelerator`."""

from hf_speed.integrations.accelerate.accelerator import Accelerator

__all__ = ["Accelerator"]
