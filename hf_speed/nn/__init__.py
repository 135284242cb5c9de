"""Layers that stand in for those of a Hugging Face model."""
