"""Digests of the base weights at the sites: whether a model is the one that a steering was trained on.

A model is stored in one dtype and loaded in another, so a digest is taken of the weights rounded to bfloat16. A second
one, of the weights rounded to float16 first, stands behind it where it differs; two models agree at a site if any of
their digests do. So a steering that was trained in float32, bfloat16 or float16 knows its model in float32 and in the
dtype it was trained in, and weights that were published in bfloat16 or float16 are known in all three.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dso.steering.config import SteeringError
from dso.steering.hosts import named_sites, weights, whole

DIGITS = 16
_KNOWN: WeakKeyDictionary[nn.Module, tuple[object, str]] = WeakKeyDictionary()  # what was read once is not read again


def fingerprint(model: nn.Module, sites: Iterable[str]) -> dict[str, str]:
    """Site -> digest of its weights, for the named sites of a model.

    Raises:
        SteeringError: if weights are not loaded, or quantised.
    """
    modules, found = named_sites(model), {}
    for site in sites:
        with whole(modules[site]):
            found[site] = _site_digest(site, modules[site])
    return found


def difference(stated: Mapping[str, str] | str, model: nn.Module, sites: Iterable[str]) -> str | None:
    """The first site whose weights are not those that were stated, or None. Format 1 states one digest of all sites."""
    if isinstance(stated, str):
        ordered = sorted(sites)
        return None if not stated or stated == _first_format(model, ordered) else ordered[0]
    found = fingerprint(model, stated)
    return next((site for site in stated if not {*stated[site].split("/")} & {*found[site].split("/")}), None)


def _site_digest(site: str, module: nn.Module) -> str:
    state = [(value.data_ptr(), value._version, value.dtype) for value in module.state_dict().values() if _plain(value)]
    if module not in _KNOWN or _KNOWN[module][0] != state:
        named = list(weights(site, module))
        plain = _digest(site, named, lambda value: value)
        half = _digest(site, named, lambda value: value.to(torch.float16))
        _KNOWN[module] = state, plain if half == plain else f"{plain}/{half}"
    return _KNOWN[module][1]


def _plain(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_meta


def _digest(site: str, named: list[tuple[str, Tensor]], rounded) -> str:
    digest = hashlib.sha256(site.encode())
    for name, value in named:
        digest.update(name.encode())
        narrow = rounded(value.detach()).to(torch.bfloat16).contiguous().cpu()
        digest.update(narrow.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:DIGITS]


def _first_format(model: nn.Module, sites: list[str]) -> str:
    """The digest of checkpoints of format 1: of float32 values."""
    modules, digest = named_sites(model), hashlib.sha256()
    for site in sites:
        digest.update(site.encode())
        for name, value in weights(site, modules[site]):
            digest.update(name.encode())
            digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def require_same(stated: Mapping[str, str] | str, model: nn.Module, sites: Iterable[str], made_for: str) -> None:
    """Refuse a model of other weights.

    Raises:
        SteeringError: naming the site, and the way to steer the model all the same.
    """
    way = "attach(model, check=False) steers it all the same"
    try:
        other = difference(stated, model, sites)
    except SteeringError as error:
        raise SteeringError(f"{error}; {way}") from error
    if other is not None:
        raise SteeringError(f"the weights of module {other!r} are not the ones trained on; {made_for}; {way}")
