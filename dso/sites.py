"""Which modules are steered.

By default every LayerNorm or RMSNorm of the language backbone whose width is the model's hidden size: input,
post-attention, pre- and post-feed-forward and final norms (DSO, arXiv 2512.15926, section 4). Per-head
query/key norms have another width; vision towers and projectors lie outside the language backbone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn


def resolve_sites(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, int]:
    """The sites of a model: dotted module name -> width, in the order of the forward definition.

    Args:
        patterns: regular expressions that a dotted name must match in full; any norm in the whole model may be named
            by them. None means the default of the module's docstring.

    Raises:
        ValueError: if nothing matches, or a pattern matches nothing or is no regular expression.
    """
    norms = {name: module.weight.numel() for name, module in model.named_modules() if _is_norm(module)}
    if patterns is None:
        prefix, width = _language_backbone(model)
        sites = {n: w for n, w in norms.items() if n.startswith(prefix) and w == width and not _is_head_norm(n)}
        if not sites:
            raise ValueError(f"{type(model).__name__} has no norm of width {width} in its language backbone; name the sites by pattern")
        return sites
    sites = {}
    for pattern in patterns:
        try:
            matched = [name for name in norms if re.fullmatch(pattern, name)]
        except re.error as error:
            raise ValueError(f"site pattern {pattern!r} is no regular expression: {error}") from error
        if not matched:
            raise ValueError(f"site pattern {pattern!r} matches no norm; norms are e.g. {', '.join(list(norms)[:3])}")
        sites.update((name, norms[name]) for name in matched)
    return {name: sites[name] for name in norms if name in sites}


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and weight is not None and weight.ndim == 1


def _is_head_norm(name: str) -> bool:
    """Query/key norms: of the hidden size in models that normalise all heads at once (OLMo2)."""
    return re.search(r"(^|[._])[qk]_(layer)?norm$", name) is not None


def _language_backbone(model: nn.Module) -> tuple[str, int]:
    """The dotted prefix of the language backbone, and its hidden size."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for name, module in model.named_modules():
        if module is decoder:
            return (f"{name}." if name else ""), model.config.get_text_config().hidden_size
    return "", model.config.get_text_config().hidden_size
