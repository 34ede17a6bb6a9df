"""Specs of environments around a model: copies of them share the model."""

from __future__ import annotations

from typing import Any

from gymnasium.envs.registration import EnvSpec


class SharedKwargs(dict[str, Any]):
    """Arguments of which a deep copy is a shallow one.

    Gymnasium deep-copies a spec whenever somebody reads ``env.spec`` of a wrapped environment, and the spec holds the
    model among the arguments.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedKwargs:
        return SharedKwargs(self)


class SharedSpec:
    """A base for environments, before Gymnasium's: whatever copies ``spec`` leaves the model where it is."""

    _spec: EnvSpec | None = None

    @property
    def spec(self) -> EnvSpec | None:
        """How Gymnasium made this environment; None where Gymnasium did not."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        if spec is not None:
            spec.kwargs = SharedKwargs(spec.kwargs)
        self._spec = spec
