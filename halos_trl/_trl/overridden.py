"""A context manager that sets attributes temporarily."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def overridden(target: Any, **values: Any) -> Iterator[None]:
    """Set instance attributes for the duration of a block."""
    own = vars(target)
    before = {name: own[name] for name in values if name in own}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name in values:
            if name in before:
                setattr(target, name, before[name])
            else:
                delattr(target, name)
