"""Which linear layers read the output of a site, and whether nobody else does.

    found = readers(model, ["model.layers.0.input_layernorm"])["model.layers.0.input_layernorm"]
    found.linears   # ("model.layers.0.self_attn.q_proj", ...k_proj, ...v_proj), in the model's order
    found.sole      # True: a change of the norm's output is a change of these layers' inputs and of nothing else
    found.reason    # why not, where sole is False

An offset behind a norm can move into the biases of the layers that read it, and a slope into their weights, only where
``sole`` is true. A false answer is never a guess: the model is run on a few tokens and

1. a layer reads the site if the tensor that it gets lies in the memory of the site's output;
2. the readers are given the site's own output and everybody else a changed one: where the model's logits move,
   somebody else reads it too (a residual, a router, a convolution, experts that are no linear layers).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dso.steering.handle import unsteered
from dso.steering.hosts import named_sites, unwrapped
from dso.steering.sites import linear_width

LENGTH = 5  # tokens of the probe
MOVED = 64  # roundings of the largest logit, beyond which a logit has moved


@dataclass(frozen=True, slots=True)
class Readers:
    """Who reads the output of one site.

    Attributes:
        linears: dotted names of the linear layers (``nn.Linear``, quantised ones, GPT-2's ``Conv1D``) that read it.
        sole: whether they are the only ones, and read nothing else.
        reason: empty where ``sole`` is true, else one clause that says why it is not, such as "others read it too".
    """

    linears: tuple[str, ...]
    sole: bool
    reason: str = ""


def readers(model: nn.Module, sites: Iterable[str], inputs: Mapping[str, Tensor] | None = None) -> dict[str, Readers]:
    """The readers of each site, by site.

    Runs the model once to find them and at least once more to prove that they are the only ones; steerings that are
    attached are at scale 0 meanwhile, and the model is left as it was.

    Args:
        model: a causal language model, or a vision-language model; it may be wrapped.
        sites: dotted names of modules with one tensor as output, as in a steering's config.
        inputs: keyword arguments of the model's forward. By default five tokens of text; a model with layers that only
            images reach (Mllama) needs some to say more of them than that they did not run.
    """
    plain = unwrapped(model)
    modules = named_sites(model)
    linears = {name: module for name, module in modules.items() if linear_width(module)}
    linears = {name: module for name, module in linears.items() if not _inside(name, linears)}
    given = dict(inputs or probe_inputs(plain))
    training = plain.training
    plain.eval()
    try:
        with torch.no_grad(), unsteered(model):
            trace = _Trace(modules, list(sites), linears)
            base = trace.find(plain, given)
            open_sites = [site for site in trace.sites if not trace.reason(site)]
            together = bool(open_sites) and _same(base, trace.without_others(plain, given, open_sites))
            sole = {site: together or _same(base, trace.without_others(plain, given, [site])) for site in open_sites}
    finally:
        plain.train(training)
    return {
        site: Readers(
            trace.read_by(site),
            sole.get(site, False),
            trace.reason(site) or ("" if sole[site] else "others read it too"),
        )
        for site in trace.sites
    }


def probe_inputs(model: Any) -> dict[str, Tensor]:
    """A few token ids, none of which the model's config gives a meaning to (an image's slot, an end)."""
    text = model.config.get_text_config()
    special = {
        value
        for config in (model.config, text)
        for name, value in config.to_dict().items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    ids = [number for number in range(text.vocab_size) if number not in special]
    chosen = [ids[(7 * place + 3) % len(ids)] for place in range(LENGTH)]
    device = model.get_input_embeddings().weight.device
    device = next((p.device for p in model.parameters() if not p.is_meta), device) if device.type == "meta" else device
    return {"input_ids": torch.tensor([chosen], device=device)}


class _Trace:
    """Hooks that follow the outputs of sites to the linear layers that get them."""

    def __init__(self, modules: Mapping[str, nn.Module], sites: list[str], linears: Mapping[str, nn.Module]):
        self.sites = sites
        self.modules = modules
        self.linears = linears
        self.runs: Counter[str] = Counter()  # of sites
        self.calls: Counter[str] = Counter()  # of linear layers
        self.reads: Counter[tuple[str, str]] = Counter()  # calls in which (site, linear layer) met
        self._odd: dict[str, str] = {}
        self._outputs: dict[int, tuple[str, Tensor]] = {}  # address -> site and output, kept alive during the pass

    def find(self, model: nn.Module, given: Mapping[str, Any]) -> Tensor:
        """Run the model, see who reads what, and return its logits."""

        def site_hook(site: str):
            def hook(module: nn.Module, args: tuple, output: Any) -> None:
                self.runs[site] += 1
                if not isinstance(output, Tensor):
                    self._odd[site] = f"it gives a {type(output).__name__}, not one tensor"
                else:
                    self._outputs[_address(output)] = site, output

            return hook

        def linear_hook(name: str):
            def hook(module: nn.Module, args: tuple) -> None:
                self.calls[name] += 1
                found = self._outputs.get(_address(args[0])) if args else None
                if found and _whole_rows(args[0], found[1]):
                    self.reads[found[0], name] += 1

            return hook

        hooks = {site: site_hook(site) for site in self.sites}
        logits = self._run(model, given, hooks, {name: linear_hook(name) for name in self.linears})
        self._outputs.clear()
        return logits

    def without_others(self, model: nn.Module, given: Mapping[str, Any], sites: list[str]) -> Tensor:
        """The logits where the readers get the outputs of these sites, and everybody else something different."""
        own: dict[int, tuple[Tensor, Tensor]] = {}  # address of the changed output -> it and the site's own
        generator = torch.Generator().manual_seed(0)

        def site_hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            noise = torch.randn(output.shape, generator=generator).to(output)
            changed = output + (output.abs().mean() + 1) * noise
            own[_address(changed)] = changed, output
            return changed

        def linear_hook(module: nn.Module, args: tuple) -> tuple | None:
            found = own.get(_address(args[0]))
            if not found:
                return None
            changed, output = found
            start = args[0].storage_offset() - changed.storage_offset() + output.storage_offset()
            return torch.as_strided(output, args[0].shape, args[0].stride(), start), *args[1:]

        names = {name for site in sites for name in self.read_by(site)}
        return self._run(model, given, dict.fromkeys(sites, site_hook), dict.fromkeys(names, linear_hook))

    def read_by(self, site: str) -> tuple[str, ...]:
        """The linear layers that read a site."""
        return tuple(name for name in self.linears if self.reads[site, name])

    def reason(self, site: str) -> str:
        """What speaks against sole readers before anything was changed; empty where nothing does."""
        if site in self._odd:
            return self._odd[site]
        if not self.runs[site]:
            return "it did not run on the probe's tokens"
        found = self.read_by(site)
        if not found:
            return "no linear layer reads it"
        if mixed := [name for name in found if self.reads[site, name] != self.calls[name]]:
            return f"{mixed[0]} reads something else, too"
        return ""

    def _run(self, model: nn.Module, given: Mapping[str, Any], sites: Mapping, linears: Mapping) -> Tensor:
        with _hooked(self.modules, sites, linears):
            output: Any = model(**given)
        return output.logits.detach().clone()


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], after: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[None]:
    hooks = [modules[name].register_forward_hook(hook) for name, hook in after.items()]
    hooks += [modules[name].register_forward_pre_hook(hook) for name, hook in before.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _inside(name: str, others: Mapping[str, Any]) -> bool:
    """Whether a module lies within another one of these, such as the base layer within an adapter's."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in others for length in range(1, len(parts)))


def _address(value: Any) -> int:
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else 0


def _whole_rows(view: Tensor, output: Tensor) -> bool:
    """Whether a tensor in the memory of another one consists of its rows, and not of parts of them."""
    width = output.shape[-1]
    aligned = (view.storage_offset() - output.storage_offset()) % width == 0
    return output.is_contiguous() and view.shape[-1] == width and view.stride(-1) == 1 and aligned


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding: the same sums may be formed in another order where tensors lie elsewhere."""
    room = MOVED * torch.finfo(one.dtype).eps * one.abs().max().item()
    return bool((one - other).abs().max() <= room)
