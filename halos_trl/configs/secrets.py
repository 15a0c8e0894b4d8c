"""Access tokens, which must not be saved with a model."""

from __future__ import annotations

import copy
from typing import Any

_NESTED = {"model_init_kwargs": ("token", "use_auth_token")}


def _without_nested_tokens(values: dict[str, Any]) -> dict[str, Any]:
    for name, keys in _NESTED.items():
        nested = values.get(name)
        if isinstance(nested, dict):
            values = values | {name: {key: None if key in keys else value for key, value in nested.items()}}
    return values


class PickledWithoutTokens:
    """A config whose access tokens are removed when it is pickled, because `training_args.bin` is part of every
    checkpoint and is pushed with the model. Copies keep the tokens.
    """

    def __getstate__(self) -> dict[str, Any]:
        return _without_nested_tokens(vars(self)) | {"hub_token": None}

    def to_dict(self) -> dict[str, Any]:
        """All settings, as they are logged, with tokens hidden."""
        return _without_nested_tokens(super().to_dict())  # type: ignore[misc]

    def __copy__(self) -> Any:
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin
