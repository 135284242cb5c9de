"""Checkpoints of other frameworks, read safely and written again as one of hf_speed."""

from hf_speed.checkpoint.imports.convert import Naming, StateGroup, write_imported
from hf_speed.checkpoint.imports.detect import KINDS, open_foreign
from hf_speed.checkpoint.imports.foreign import Foreign

__all__ = ["KINDS", "Foreign", "Naming", "StateGroup", "open_foreign", "write_imported"]
