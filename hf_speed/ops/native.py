"""The native library: `csrc/` behind a C ABI, built by the installation, loaded with ctypes.

Calls release the GIL. Each of the other files of this room declares the functions that it calls.
"""

import ctypes
import os
from pathlib import Path

from hf_speed.errors import ConfigError

ABI = 1
"""HFS_ABI of csrc/update.h that this code was written for."""

LIBRARY = Path(__file__).resolve().parents[1] / "_native.abi3.so"


def load(path: Path) -> ctypes.CDLL:
    """Load the native library, its symbols visible to nobody else.

    Raises:
        ConfigError: it was not built, cannot be loaded here, or is of another version.
    """
    advice = "Install hf_speed again (from a checkout: pip install -e .); it takes a C++17 compiler"
    if not path.is_file():
        raise ConfigError(f"hf_speed's native library is not built: there is no {path}. {advice}.")
    try:
        loaded = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_NOW)
        abi = int(loaded.hfs_abi())
    except (OSError, AttributeError) as error:
        raise ConfigError(
            f"hf_speed's native library cannot be loaded here ({error}). {advice}."
        ) from error
    if abi != ABI:
        raise ConfigError(
            f"hf_speed's native library {path} is of another version ({abi}, not {ABI}) than the "
            f"Python code. {advice}."
        )
    return loaded


library = load(LIBRARY)
"""The library, loaded once."""
