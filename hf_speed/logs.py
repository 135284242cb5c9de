"""Logging: stdlib loggers that speak on rank 0 unless told otherwise.

    _log = get_logger(__name__)
    _log.info("engine: %d units", num_units)                                # rank 0 only
    _log.warning("out of host memory", extra={"all_ranks": True})           # every rank
    _log.log_once(logging.WARNING, "%s is not elementwise", name)           # once per logger,
    message and values

INFO: what was built, once. WARNING: the user should act. Handlers and levels are the application's
    affair.
"""

import logging
from collections.abc import Mapping
from typing import Any

from hf_speed.config import env


class RankLogger(logging.LoggerAdapter[logging.Logger]):
    """Speaks on rank 0; on every rank where a record has `extra={"all_ranks": True}`."""

    def __init__(self, logger: logging.Logger) -> None:
        """Wrap `logger`; nothing is configured."""
        super().__init__(logger, None)
        self._seen: set[tuple[object, ...]] = set()

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log `msg % args` on rank 0; with `extra={"all_ranks": True}` on every rank."""
        extra: Mapping[str, object] = kwargs.get("extra") or {}
        if not self.isEnabledFor(level):
            return
        rank = env.current_rank()
        if rank != 0 and not extra.get("all_ranks", False):
            return
        # Without this the record would name this file instead of the caller's.
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        kwargs["extra"] = {"rank": rank, **extra}
        self.logger.log(level, msg, *args, **kwargs)

    def log_once(self, level: int, msg: str, *args: object, **kwargs: Any) -> None:
        """Log `msg % args` the first time that this logger sees this message with these values."""
        key = (level, msg, *map(str, args))
        if key in self._seen:
            return
        self._seen.add(key)
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        self.log(level, msg, *args, **kwargs)


def get_logger(name: str) -> RankLogger:
    """The logger of module `name`, as in `get_logger(__name__)`."""
    return RankLogger(logging.getLogger(name))
