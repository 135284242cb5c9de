"""Tensor slicing: each layer's matrices divided over ranks (Megatron-LM, arXiv:1909.08053)."""
