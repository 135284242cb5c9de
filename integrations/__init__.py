"""Where hf_speed meets other libraries: the only room that imports transformers, accelerate, peft, trl or the Hub's client."""
