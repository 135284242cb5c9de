"""The slow imports of the server that ranks are forked from; no Python thread is started."""

from importlib import import_module

for _name in ("torch.distributed", "accelerate", "transformers.trainer"):
    import_module(_name)
