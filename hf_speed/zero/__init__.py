"""ZeRO: gather, reduce, step (arXiv:1910.02054)."""
