"""Who talks to whom: the axes of a run, their process groups, and every collective."""

from hf_speed.mesh.axes import AXES, Axis, AxisGroup
from hf_speed.mesh.parallel_mesh import Lane, ParallelMesh

__all__ = ["AXES", "Axis", "AxisGroup", "Lane", "ParallelMesh"]
