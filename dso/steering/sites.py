"""Which modules are steered.

``norms``, the default: every LayerNorm or RMSNorm of the language backbone whose width is the model's hidden size:
input, post-attention, pre- and post-feed-forward and final norms (DSO, arXiv 2512.15926, section 4). Per-head
query/key norms have another width; vision towers and projectors lie outside the language backbone.

``attention`` (ours): the outputs of the language backbone's query, key and value projections. An operator there reaches
what heads look for and what they pass on, and nothing else.

By pattern any norm of the model may be named, and any linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dso.errors import UserError

PROJECTION = re.compile(r"(^|\.)((q|k|v|qkv)_proj|query|key|value|query_key_value|c_attn|Wqkv)$")
HEAD_NORM = re.compile(r"(^|[._])(q|k|kv|query|key)_(a_)?(layer)?norm$")


def resolve_sites(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, int]:
    """The sites of a model: dotted module name -> width, in the order in which the model defines them.

    Args:
        patterns: each is ``norms`` or ``attention`` (see the module's docstring), or a regular expression that a dotted
            name must match in full: the norms in the whole model that it matches or, if there are none, the linear
            layers. None means ``norms``.

    Raises:
        UserError: if nothing matches, or a pattern matches nothing or is no regular expression.
    """
    sites: dict[str, int] = {}
    for pattern in ["norms"] if patterns is None else patterns:
        sites.update(_KINDS[pattern](model) if pattern in _KINDS else _matching(model, pattern))
    return {name: sites[name] for name, _ in model.named_modules() if name in sites}


def _norms(model: nn.Module) -> dict[str, int]:
    prefix, width = language_backbone(model)
    norms = _widths(model, _norm_width)
    sites = {n: w for n, w in norms.items() if n.startswith(prefix) and w == width and not _is_head_norm(n)}
    if not sites:
        raise UserError(
            f"{type(model).__name__} has no norm of width {width} in its language backbone; name the sites by pattern"
        )
    return sites


def _attention(model: nn.Module) -> dict[str, int]:
    prefix, _ = language_backbone(model)
    linear = _widths(model, linear_width)
    sites = {name: width for name, width in linear.items() if name.startswith(prefix) and PROJECTION.search(name)}
    if not sites:
        raise UserError(
            f"{type(model).__name__} has no query, key or value projection of a known name in its language backbone; "
            "name the sites by pattern"
        )
    return sites


_KINDS = {"norms": _norms, "attention": _attention}


def _matching(model: nn.Module, pattern: str) -> dict[str, int]:
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise UserError(f"site pattern {pattern!r} is no regular expression: {error}") from error
    norms = _widths(model, _norm_width)
    for known in (norms, _widths(model, linear_width)):
        if matched := {name: width for name, width in known.items() if wanted.fullmatch(name)}:
            return matched
    examples = ", ".join(list(norms)[:3]) or "none"
    raise UserError(
        f"site pattern {pattern!r} matches no norm; norms are e.g. {examples}. Nor does it match a linear layer, "
        f"and it is not {' or '.join(_KINDS)}"
    )


def _widths(model: nn.Module, width_of: Callable[[nn.Module], int]) -> dict[str, int]:
    return {name: width for name, module in model.named_modules() if (width := width_of(module))}


def site_width(module: nn.Module) -> int:
    """Size of what a module gives: a linear layer's outputs, else a one-dimensional weight's; 0 where neither says."""
    weight = getattr(module, "weight", None)
    return linear_width(module) or (_length(weight) if isinstance(weight, Tensor) else 0)


def _norm_width(module: nn.Module) -> int:
    """Size of the last dimension that a LayerNorm or RMSNorm works on; 0 for any other module."""
    kind = type(module).__name__.lower()
    if "norm" not in kind or any(other in kind for other in ("batchnorm", "groupnorm", "instancenorm")):
        return 0  # those norm over other dimensions than the last
    weight = getattr(module, "weight", None)
    if weight is None:  # a norm without parameters (OLMo) states its shape
        shape: tuple[int, ...] = tuple(getattr(module, "normalized_shape", ()))
        return int(shape[0]) if len(shape) == 1 else 0
    return _length(weight)


def _length(weight: Tensor) -> int:
    """Of a one-dimensional weight, also where ZeRO-3 has divided it among processes; 0 for any other."""
    shape = getattr(weight, "ds_shape", weight.shape)
    return int(shape[0]) if len(shape) == 1 else 0


def linear_width(module: nn.Module) -> int:
    """Number of outputs of a linear layer, also of a quantised one or of GPT-2's Conv1D; 0 for any other module."""
    kind = type(module).__name__.lower()
    width = getattr(module, "nf" if kind == "conv1d" else "out_features", 0)
    return width if isinstance(width, int) and ("linear" in kind or kind == "conv1d") else 0


def _is_head_norm(name: str) -> bool:
    """Query/key norms: of the hidden size in models that normalise all heads at once (OLMo2)."""
    return HEAD_NORM.search(name) is not None


def language_backbone(model: Any) -> tuple[str, int]:
    """The dotted prefix of the language backbone, and its hidden size."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for name, module in model.named_modules():
        if module is decoder:
            return (f"{name}." if name else ""), model.config.get_text_config().hidden_size
    return "", model.config.get_text_config().hidden_size
