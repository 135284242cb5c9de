"""Tensor slicing: each layer's matrices divided over ranks (Megatron-LM, arXiv:1909.08053)."""

from hf_speed.nn.sliced.deal import Heads, can_deal, deal_heads, features, nearest
from hf_speed.nn.sliced.model import SlicedModel, slice_model
from hf_speed.nn.sliced.plan import (
    Column,
    Region,
    Row,
    Rule,
    SlicePlan,
    Span,
    VocabEmbedding,
    VocabHead,
)

__all__ = [
    "Column",
    "Heads",
    "Region",
    "Row",
    "Rule",
    "SlicePlan",
    "SlicedModel",
    "Span",
    "VocabEmbedding",
    "VocabHead",
    "can_deal",
    "deal_heads",
    "features",
    "nearest",
    "slice_model",
]
