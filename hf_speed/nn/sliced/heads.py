"""Head counts that an attention module keeps, or reads in its config: made those of this rank.

Model code reshapes by them. They are known by their names and by having the whole model's value.
"""

import inspect
from typing import Any

from torch import nn

from hf_speed.nn.sliced.deal import Heads

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_query_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv")
GROUPS = ("num_key_value_groups", "n_rep")
WIDTHS = (
    "all_head_size",
    "split_size",
    "embed_dim",
    "hidden_size",
    "inner_dim",
    "attn_hidden_size",
)
"""Features of all query heads together."""
KV_WIDTHS = ("kv_dim", "kv_size", "key_value_dim")


def localise(module: nn.Module, heads: Heads, *, rank: int, width: int) -> dict[str, Any]:
    """Set the head counts of an attention module to those of a rank.

    Args:
        module: the attention.
        heads: of the whole model, and who has which.
        rank: whose counts.
        width: features of a head.

    Returns:
        The attributes that were changed, with what they were.
    """
    share = heads.shares[rank]
    whole_to_local = {
        HEADS: (heads.num_heads, share.num_heads),
        KV_HEADS: (heads.num_kv_heads, share.num_kv_heads),
        GROUPS: (heads.num_heads // heads.num_kv_heads, share.num_heads // share.num_kv_heads),
        WIDTHS: (heads.num_heads * width, share.num_heads * width),
        KV_WIDTHS: (heads.num_kv_heads * width, share.num_kv_heads * width),
    }
    before: dict[str, Any] = {}
    for names, (whole, local) in whole_to_local.items():
        for name in names:
            if vars(module).get(name) == whole and whole != local:
                before[name] = whole
                setattr(module, name, local)
    config = vars(module).get("config")
    if config is not None and _reads_counts_of_config(module):
        counts = {
            "num_attention_heads": share.num_heads,
            "num_key_value_heads": share.num_kv_heads,
        }
        before["config"] = config
        setattr(module, "config", LocalConfig(config, counts))  # noqa: B010  its type is the model's
    return before


def _reads_counts_of_config(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    names: tuple[str, ...] = code.co_names if code is not None else ()
    return "num_attention_heads" in names or "num_key_value_heads" in names


class LocalConfig:
    """A model's config as one attention module sees it: with the head counts of this rank.

    A view, not a copy: what is changed in the config later (the attention's implementation) shows.
    """

    def __init__(self, whole: Any, counts: dict[str, int]) -> None:
        self._whole = whole
        self._counts = counts

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_whole", "_counts"):
            raise AttributeError(name)
        counts = self._counts
        return counts[name] if name in counts else getattr(self._whole, name)
