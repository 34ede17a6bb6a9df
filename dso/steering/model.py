"""Steering: the operators of a model's sites, attached as forward hooks and turned by one scale.

    steering = Steering.from_pretrained("runs/hiring/steering")
    with steering.on(model, scale=0.4):  # the operators follow the model to its device
        model.generate(**inputs)
    handle = steering.attach(model)
    handle.scale = 0.8            # live; a tensor of shape (batch,) steers each row by itself
    handle.detach()

Scale 0 is the base model bit for bit: the hook returns its input. A change of scale in the middle of a
generation leaves keys and values of the old scale in the cache, so start a new cache with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dso.errors import UserError
from dso.steering.checkpoint import SteeringConfig, SteeringError, fingerprint, read_checkpoint, write_checkpoint
from dso.steering.operators import SteeringOperator, make_operator
from dso.steering.sites import resolve_sites, site_width


class Steering(nn.Module):
    """The operators of all sites.

    Args:
        config: sites with their widths, the operator kind, and what a checkpoint states besides.
    """

    def __init__(self, config: SteeringConfig):
        super().__init__()
        self.config = config
        self._names = tuple(config.sites)
        self._operators = nn.ModuleList(
            make_operator(config.operator, width, config.rank) for width in config.sites.values()
        )

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        operator: str = "affine",
        rank: int | None = None,
        sites: Sequence[str] | None = None,
        **facts: Any,
    ) -> Steering:
        """A fresh steering (the identity) for a model; ``facts`` are further fields of :class:`SteeringConfig`."""
        widths = resolve_sites(model, sites)
        config = SteeringConfig(
            operator=operator, rank=rank, sites=widths, fingerprint=fingerprint(model, widths), **facts
        )
        return cls(config)

    @property
    def operators(self) -> dict[str, SteeringOperator]:
        """The operators by site name."""
        return dict(zip(self._names, self._operators, strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """Every coefficient under its key in the checkpoint, ``<site>.<a|b|u|v>``; the tensors themselves."""
        return {f"{site}.{key}": value for site, op in self.operators.items() for key, value in op.named_parameters()}

    def scaled_tensors(self, scale: float) -> dict[str, Tensor]:
        """What :meth:`tensors` of the steering would be that does at scale 1 what this one does at ``scale``."""
        scaled = {site: operator.scaled(scale) for site, operator in self.operators.items()}
        return {f"{site}.{key}": value for site, own in scaled.items() for key, value in own.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy coefficients from a mapping with exactly the keys and shapes of :meth:`tensors`.

        Raises:
            SteeringError: naming the first key that is missing, unknown or of another shape.
        """
        own = self.tensors()
        if different := sorted(set(own) ^ set(tensors)):
            where = "missing from" if different[0] in own else "unknown in"
            raise SteeringError(f"{different[0]!r} is {where} the steering's tensors ({len(different)} such keys)")
        for key, value in own.items():
            if tensors[key].shape != value.shape:
                raise SteeringError(f"{key!r} has shape {tuple(tensors[key].shape)}, expected {tuple(value.shape)}")
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(tensors[key])

    def attach(self, model: nn.Module, scale: float | Tensor = 1.0) -> Handle:
        """Steer a model until the handle is detached.

        Raises:
            SteeringError: if the model lacks a site, has another width there, or other weights than the ones
                that the steering was trained on; the model is left as it was.
        """
        modules = self._check_model(model)
        return Handle(self, modules, scale)

    @contextmanager
    def on(self, model: nn.Module, scale: float | Tensor = 1.0) -> Iterator[Handle]:
        """Steer a model within a block; it is restored at the end, also on an error."""
        handle = self.attach(model, scale)
        try:
            yield handle
        finally:
            handle.detach()

    def _check_model(self, model: nn.Module) -> dict[str, nn.Module]:
        modules = dict(model.named_modules())
        made_for = f"the steering was made for {self.config.base_model or 'another model'}"
        for site, width in self.config.sites.items():
            if site not in modules:
                raise SteeringError(f"the model has no module {site!r}; {made_for}")
            found = site_width(modules[site])
            if found not in (width, 0):
                raise SteeringError(f"module {site!r} has width {found}, expected {width}; {made_for}")
        if self.config.fingerprint and fingerprint(model, self.config.sites) != self.config.fingerprint:
            raise SteeringError(f"the model's weights at the steered sites are not the ones trained on; {made_for}")
        return {site: modules[site] for site in self.config.sites}

    def save_pretrained(self, folder: str | Path, card: str = "") -> None:
        """Write ``dso_config.json``, ``dso_model.safetensors`` and ``README.md`` (``card``), all or nothing."""
        write_checkpoint(folder, self.config, self.tensors(), card)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> Steering:
        """Read a steering from a folder, or from the Hub by its id.

        Raises:
            SteeringError: if there is none, or it is damaged, or of a newer format.
        """
        config, tensors = read_checkpoint(source, revision)
        try:
            steering = cls(config)
            steering.load_tensors(tensors)
        except UserError as error:
            raise SteeringError(f"{source}: {error}") from error
        return steering.requires_grad_(False)


class Handle:
    """A steering attached to a model; :attr:`scale` may be set at any time.

    The scale lives in a tensor, so that a compiled model need not be recompiled when it changes.
    """

    def __init__(self, steering: Steering, modules: Mapping[str, nn.Module], scale: float | Tensor):
        # In the precision of the scale itself, so that a bound such as 1.2 can be set.
        self._limits = torch.tensor(steering.config.scale_range, dtype=torch.float32).tolist()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.scale = scale
        try:
            for site, operator in steering.operators.items():
                self._hooks.append(modules[site].register_forward_hook(self._hook(site, operator)))
        except BaseException:
            self.detach()
            raise

    @property
    def scale(self) -> float | Tensor:
        """The coefficient s: a float, or a tensor of shape (batch,)."""
        return self._scale.clone() if self._scale.ndim else self._scale.item()

    @scale.setter
    def scale(self, value: float | Tensor) -> None:
        try:  # a copy: what the caller does to its tensor afterwards would pass by the checks
            scale = torch.as_tensor(value).detach().to(torch.float32, copy=True)
            scale = scale if scale.ndim else scale.cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise SteeringError(f"scale is {value!r}, expected a number or one value a batch row") from error
        low, high = self._limits
        if scale.ndim > 1 or not scale.numel():
            raise SteeringError(f"scale has shape {tuple(scale.shape)}, expected a number or one value a batch row")
        for number in scale.flatten().tolist():
            if not math.isfinite(number) or not low <= number <= high:
                raise SteeringError(
                    f"scale is {number:g}, expected a number from {low:g} to {high:g}, the range this steering states"
                )
        self._scale = scale
        self._off = not bool(scale.any())

    def _hook(self, site: str, operator: SteeringOperator) -> Callable[[nn.Module, tuple, Tensor], Tensor | None]:
        def steer(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if self._off:
                return None
            if not isinstance(output, Tensor):
                raise SteeringError(f"site {site!r} gives a {type(output).__name__}, expected one tensor")
            if next(operator.parameters()).device != output.device:
                operator.to(output.device)
            scale = self._scale
            if not scale.ndim:  # one number on the CPU goes with tensors of any device, without a transfer
                return operator(output, scale)
            if scale.shape[0] != output.shape[0]:
                raise SteeringError(f"{scale.shape[0]} scales for a batch of {output.shape[0]} at site {site!r}")
            rows = scale.to(output.device).view(-1, *[1] * (output.ndim - 1))
            return torch.where(rows == 0, output, operator(output, rows))

        return steer

    def detach(self) -> None:
        """Take the hooks off; doing it twice is harmless."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
