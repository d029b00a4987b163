"""Processes that torchrun started: the first runs the line, the others join it where there is something to train."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

from torch.distributed.rendezvous import rendezvous

_LONG = timedelta(days=365)  # the teacher encodes before anything is trained


def rank() -> int:
    """Return this process's number, 0 where it is the only one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return how many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def announce(number: int, **message: Any) -> None:
    """Tell the other processes what the first is about to do; messages are numbered from 0."""
    if world_size() > 1:
        _store().set(f"embedistill/{number}", json.dumps(message))


def follow() -> Iterator[dict[str, Any]]:
    """Yield what the first process announces, until it announces nothing more: an empty message."""
    for number in count():
        name = f"embedistill/{number}"
        _store().wait([name], _LONG)
        message = json.loads(_store().get(name))
        if not message:
            return
        yield message


@cache
def _store() -> Any:
    return next(rendezvous("env://"))[0]
