"""Optimizers as update rules over flat shards, and optimizers of our own."""

from hf_speed.optim.lion import Lion
from hf_speed.optim.rules import Chunk, Span, StateSpec, UpdateRule, rule_of

__all__ = ["Chunk", "Lion", "Span", "StateSpec", "UpdateRule", "rule_of"]
