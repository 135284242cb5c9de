"""What the Trainer pushes to the Hub of a run's directory: all but what only the run needs.

The Trainer uploads its output_dir and names what stays behind in the call itself (`checkpoint-*`,
`_*`). For as long as it pushes, that call gets the names of our files too.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import transformers.trainer

from hf_speed.checkpoint.latest import LATEST_NAME

_OURS = (LATEST_NAME, f".{LATEST_NAME}-*")


@contextlib.contextmanager
def without_run_files() -> Iterator[None]:
    """Leave out of the Trainer's uploads the file that names the newest checkpoint."""
    module: Any = transformers.trainer
    # One of both is there: the second in older versions.
    before = {
        name: getattr(module, name) for name in ("hf_api", "upload_folder") if hasattr(module, name)
    }
    for name, value in before.items():
        made = _leaving_out(value) if name == "upload_folder" else _api_of(value)
        setattr(module, name, made)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _api_of(make: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: _Api(make())


def _leaving_out(upload: Callable[..., Any]) -> Callable[..., Any]:
    def upload_folder(**options: Any) -> Any:
        # A checkpoint goes whole into a directory of its own.
        if options.get("path_in_repo") is None:
            options["ignore_patterns"] = [*(options.get("ignore_patterns") or ()), *_OURS]
        return upload(**options)

    return upload_folder


class _Api:
    """Another HfApi, whose uploads of a run's directory leave our files out."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self.upload_folder = _leaving_out(api.upload_folder)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)
