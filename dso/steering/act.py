"""Maps of Linear-AcT as a steering: to turn, merge and export them, or to start training from.

Linear-AcT (Rodriguez et al., "Controlling Language and Diffusion Models by Transporting Activations", ICLR 2025, arXiv
2410.23054) moves each unit of a site by a linear map between two distributions of it, ``T(h) = w h + b``, as far as a
strength ``s`` says. That is the operator ``affine`` with slopes ``w - 1``:

    (1 - s) h + s T(h) = h + s ((w - 1) h + b)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dso.steering.config import SteeringConfig, SteeringError
from dso.steering.fingerprint import fingerprint
from dso.steering.hosts import named_sites
from dso.steering.model import Steering
from dso.steering.sites import site_width


def from_linear_act(model: nn.Module, maps: Mapping[str, tuple[Tensor, Tensor]], **facts: Any) -> Steering:
    """An affine steering that does at scale s what the maps do at strength s.

    Args:
        model: whose modules the maps move.
        maps: dotted module name -> (w, b), each of shape (d,) for a module whose output is d wide.
        facts: further fields of :class:`~dso.steering.config.SteeringConfig`, such as ``base_model`` and ``groups``.

    Raises:
        SteeringError: if there is no such module, or a map has another shape than its output or is not finite.
    """
    modules = named_sites(model)
    tensors: dict[str, Tensor] = {}
    for site, (slope, offset) in maps.items():
        if site not in modules:
            raise SteeringError(f"the model has no module {site!r}, which a map is for")
        width = site_width(modules[site]) or slope.numel()
        if slope.shape != (width,) or offset.shape != (width,):
            found = f"{tuple(slope.shape)} and {tuple(offset.shape)}"
            raise SteeringError(f"the map of {site!r} has shapes {found}, expected ({width},) twice")
        if not (slope.isfinite().all() and offset.isfinite().all()):
            raise SteeringError(f"the map of {site!r} is not finite")
        tensors |= {f"{site}.a": slope.detach().float() - 1, f"{site}.b": offset.detach().float()}
    sites = {site: slope.numel() for site, (slope, _) in maps.items()}
    stated = {"fingerprint": fingerprint(model, sites), **facts}
    steering = Steering(SteeringConfig(operator="affine", sites=sites, **stated))
    steering.load_tensors(tensors)
    return steering
