"""The slow imports of the server that ranks are forked from; no Python thread is started."""

import gc
from importlib import import_module

for _name in ("torch.distributed", "accelerate", "transformers.trainer"):
    import_module(_name)
# accelerate collects garbage whenever it frees memory: a third of a small training's time, unless
# what was imported here, which never is garbage, is left out.
gc.freeze()
