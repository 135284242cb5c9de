"""The tests of hf_speed; folders mirror the rooms of the package."""
