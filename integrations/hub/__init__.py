"""Publishing: plain Hub models with a model card, in a directory or on the Hub."""
