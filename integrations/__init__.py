"""Where hf_speed meets transformers, accelerate, peft and the Hub: no other room imports them."""
