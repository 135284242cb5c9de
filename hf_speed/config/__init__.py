"""The one config tree of hf_speed, and the only reader of the environment (`env.py`)."""
