"""A sparse patch of weights: which ones change, and what they become at scale 1.

    patch = Patch.from_pretrained("runs/patch")
    with patch.on(model, scale=-0.5):
        model.generate(**inputs)
    handle = patch.attach(model)
    handle.scale = 0.8            # live
    handle.detach()               # the weights are what they were, bit for bit

Used as a :class:`~dso.steering.model.Steering` is. Unlike one it changes weights, so its scale is one number for all
rows, and a copy of a patched model is a patched model without a handle.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dso.editing.edit import at_scale
from dso.editing.localise import Places, editable
from dso.editing.storing import KIND, SUFFIX, Stored, read_patch, write_patch
from dso.steering.config import SteeringConfig, SteeringError
from dso.steering.fingerprint import fingerprint, require_same
from dso.steering.handle import Handle, attached
from dso.steering.operators import SteeringOperator


class PatchHandle(Handle):
    """A patch on a model; what it changed is kept, so that taking it off restores the very bits.

    Args:
        patch: to put on.
        model: the whole model, or what wraps it.
        weights: the model's, by the names in the patch.
        scale: alpha, one number.
    """

    def __init__(self, patch: Patch, model: nn.Module, weights: Mapping[str, Tensor], scale: float | Tensor):
        self._flat = {name: weights[name].detach().view(-1) for name in patch.places}
        devices = {name: flat.device for name, flat in self._flat.items()}
        self._index = {name: index.long().to(devices[name]) for name, index in patch.places.items()}
        self._value = {name: value.to(devices[name]) for name, value in patch.values.items()}
        self._kept = {name: flat[self._index[name]] for name, flat in self._flat.items()}
        super().__init__(patch, model, {}, scale)

    def _turn(self, value: float | Tensor) -> None:
        if isinstance(value, Tensor) and value.ndim:
            raise SteeringError("a patch changes the weights for all rows alike, so its scale is one number")
        super()._turn(value)
        self._write(self.numbers[0])

    def detach(self) -> None:
        """Take the patch off; doing it twice is harmless."""
        if self._hooks:
            self._write(0.0)
        super().detach()

    @torch.no_grad()
    def _write(self, alpha: float) -> None:
        for name, flat in self._flat.items():
            kept = self._kept[name]
            flat[self._index[name]] = kept if alpha == 0 else at_scale(kept, self._value[name], alpha)


@dataclass(frozen=True, kw_only=True)
class Patch:
    """Places in a model's weights with their values at scale 1.

    Attributes:
        config: what a steering states, too: base model, fingerprint, scale range; its sites are the patched layers.
        shapes: of the patched weights, by name.
        places: flat indices, ascending, by name.
        values: float32, one a place, by name.
        about: how it was made, by name.
        card: Markdown.
    """

    config: SteeringConfig
    shapes: dict[str, tuple[int, ...]]
    places: Places
    values: dict[str, Tensor]
    about: dict[str, str] = field(default_factory=dict)
    card: str = ""
    key: str = field(default_factory=lambda: secrets.token_hex(8))  # by which a key-value cache remembers it

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        places: Places,
        values: dict[str, Tensor],
        about: Mapping[str, str] | None = None,
        **facts: Any,
    ) -> Patch:
        """A patch for a model; ``facts`` are further fields of :class:`~dso.steering.config.SteeringConfig`."""
        weights = editable(model)
        sites = {name.removesuffix(SUFFIX): weights[name].shape[0] for name in places}
        config = SteeringConfig(operator=KIND, sites=sites, fingerprint=fingerprint(model, sites), **facts)
        shapes = {name: tuple(weights[name].shape) for name in places}
        return cls(config=config, shapes=shapes, places=places, values=values, about=dict(about or {}))

    @property
    def operators(self) -> dict[str, SteeringOperator]:
        """None: a patch has no hooks at its layers."""
        return {}

    def __len__(self) -> int:
        return sum(len(index) for index in self.places.values())

    def attach(self, model: nn.Module, scale: float | Tensor | None = None, *, check: bool = True) -> PatchHandle:
        """Patch a model until the handle is detached.

        Args:
            scale: alpha; the config's ``default_scale``, 1 unless it was set, when None.
            check: refuse a model of other weights than the target's.

        Raises:
            SteeringError: if the model is patched already, lacks a weight, has another shape there, or other weights;
                it is left as it was.
        """
        if any(isinstance(handle, PatchHandle) for handle in attached(model)):
            raise SteeringError(
                "a patch is on the model already; take it off first (handle.detach()), or set its scale"
            )
        weights, made_for = editable(model), f"the patch was made for {self.config.base_model or 'another model'}"
        for name, shape in self.shapes.items():
            if name not in weights:
                raise SteeringError(f"the model has no weight {name!r}; {made_for}")
            if tuple(weights[name].shape) != shape:
                raise SteeringError(f"{name!r} has shape {tuple(weights[name].shape)}, expected {shape}; {made_for}")
            if not weights[name].is_contiguous():
                raise SteeringError(
                    f"{name!r} is a view of another tensor, so it cannot be patched; load the model anew"
                )
        if check:
            require_same(self.config.fingerprint, model, self.config.sites, made_for)
        return PatchHandle(self, model, weights, self.config.default_scale if scale is None else scale)

    @contextmanager
    def on(self, model: nn.Module, scale: float | Tensor | None = None, *, check: bool = True) -> Iterator[PatchHandle]:
        """Patch a model within a block, as :meth:`attach` does; it is restored at the end, also on an error."""
        handle = self.attach(model, scale, check=check)
        try:
            yield handle
        finally:
            handle.detach()

    def save_pretrained(self, folder: str | Path, card: str | None = None) -> None:
        """Write the three files of a patch into a folder; other files in it stay."""
        stored = Stored(self.config, self.shapes, self.places, self.values, self.about)
        write_patch(folder, stored, self.card if card is None else card)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> Patch:
        """Read a patch from a folder, or from the Hub by its id.

        Raises:
            SteeringError: if there is none, or it is damaged, or of a newer format.
        """
        stored, card, key = read_patch(source, revision)
        return cls(**stored._asdict(), card=card, key=key)
