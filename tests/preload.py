"""Imported once by the server that the ranks of a test are forked from: the slow imports, none of which starts a thread."""

import torch  # noqa: F401
import torch.distributed  # noqa: F401
import transformers  # noqa: F401
