"""The CUDA backend, in Triton: bit for bit what `hf_speed.ops.reference` specifies.

Nothing here imports triton until a submodule is imported: there is none without Linux.
"""
