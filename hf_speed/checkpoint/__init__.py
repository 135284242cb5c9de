"""Save anywhere, load anywhere: Hub models and training state, written and read by any mesh."""

from hf_speed.checkpoint.manifest import Entry, Manifest, Piece
from hf_speed.checkpoint.model_writer import write_model
from hf_speed.checkpoint.plan import ModelPlan, PlannedFile, TensorGroup
from hf_speed.checkpoint.reader import StateReader, read_manifest
from hf_speed.checkpoint.staging import agreed
from hf_speed.checkpoint.tensorfile import TensorSpec
from hf_speed.checkpoint.writer import LocalState, write_states

__all__ = [
    "Entry",
    "LocalState",
    "Manifest",
    "ModelPlan",
    "Piece",
    "PlannedFile",
    "StateReader",
    "TensorGroup",
    "TensorSpec",
    "agreed",
    "read_manifest",
    "write_model",
    "write_states",
]
