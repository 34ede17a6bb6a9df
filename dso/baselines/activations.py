"""Activations that the baselines are fitted from: of ambiguous decisions with each of their answers behind the prompt.

A decision with the answers of G groups gives G texts, ``prompt + answer``, that differ in the answer alone: a
contrastive set. Activations are read at the last token, where the answer is complete (Panickssery et al. 2024, section
3; Li et al. 2023, section 3).

An answer is *stereotyped* where its group is the one that the context is stereotyped with. Where a context names none,
it is the group that the base model prefers furthest beyond its fair share there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dso.baselines.baseline import BaselineError, Task
from dso.decisions.decision import ABSTAIN
from dso.models.backbone import Backbone
from dso.models.encoded import Encoded
from dso.models.packing import pack
from dso.models.scoring import Layout, token_logits
from dso.models.vision import ImageInputs
from dso.steering.handle import unsteered
from dso.steering.hosts import named_sites

DECISIONS = 240  # of which activations are collected: under a minute on one core with 135 million weights
NO_TOKEN = ((0,),)  # a candidate is needed, its score is not

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Answered:
    """R answers behind their prompts.

    Attributes:
        texts: R of them.
        groups: (R,) int64 index of each answer's group.
        decisions: (R,) int64, which decision of the task's each answers; its answers stand together.
        stereotyped: (R,) bool.
    """

    texts: tuple[Encoded, ...]
    groups: Tensor
    decisions: Tensor
    stereotyped: Tensor

    def pairs(self, activations: Tensor) -> Tensor:
        """(N, d) of each of N decisions: mean of the answers that are not stereotyped less that of those that are."""
        index = self.decisions.unique(return_inverse=True)[1]
        return _means(activations, index, ~self.stereotyped) - _means(activations, index, self.stereotyped)

    def differences(self, activations: Tensor) -> Tensor:
        """(R, d) each answer less the mean of its decision's answers: the group, without the question."""
        index = self.decisions.unique(return_inverse=True)[1]
        return activations - _means(activations, index, torch.ones_like(self.stereotyped))[index]

    def matched(self) -> tuple[Tensor, Tensor]:
        """Rows of stereotyped answers, and of the other answers to the same decisions, one beside each."""
        same = self.decisions[:, None] == self.decisions
        sources, targets = (same & self.stereotyped[:, None] & ~self.stereotyped).nonzero().unbind(1)
        return sources, targets

    def group_means(self, activations: Tensor) -> Tensor:
        """(G, d) mean activation of each group's answers."""
        codes = self.groups.unique(return_inverse=True)[1]
        return _means(activations, codes, torch.ones_like(self.stereotyped))


def _means(values: Tensor, index: Tensor, chosen: Tensor) -> Tensor:
    count = torch.bincount(index[chosen], minlength=int(index.max()) + 1).clamp(min=1)
    sums = values.new_zeros(len(count), values.shape[1]).index_add(0, index[chosen], values[chosen])
    return sums / count[:, None]


def answered(task: Task, limit: int = DECISIONS) -> Answered:
    """The answers of at most ``limit`` ambiguous decisions, drawn by the task's seed, a question's orders together.

    Raises:
        BaselineError: if no ambiguous decision offers two groups, one of them stereotyped.
    """
    stereotypes = _stereotypes(task)
    texts: list[Encoded] = []
    rows: list[tuple[int, int, bool]] = []
    for index in _drawn(task, limit):
        decision = task.decisions[index]
        encoded = task.backbone.encode(decision)
        offered = zip(encoded.candidates, decision.candidates, strict=True)
        own = [(tokens, candidate.group) for tokens, candidate in offered if candidate.group != ABSTAIN]
        if len({group == stereotypes.get(decision.context) for _, group in own}) < 2:
            continue
        for tokens, group in own:
            whole = encoded.prompt + tokens
            texts.append(Encoded(whole, NO_TOKEN, _lengthened(encoded.images, len(whole))))
            rows.append((task.decisions.groups.index(group), index, group == stereotypes.get(decision.context)))
    if not rows:
        raise BaselineError("no ambiguous decision offers a stereotyped group and another one to contrast")
    groups, decisions, stereotyped = zip(*rows, strict=True)
    return Answered(tuple(texts), torch.tensor(groups), torch.tensor(decisions), torch.tensor(stereotyped))


def biased(task: Task, limit: int = DECISIONS) -> tuple[list[int], Tensor]:
    """At most ``limit`` decisions, a third of them unambiguous, and (N,) bool: whether the base model is biased there,
    which is to say that it gives a stereotyped group more than its fair share of an ambiguous decision."""
    stereotypes, fair = _stereotypes(task), dict(zip(task.decisions.groups, task.target, strict=True))
    clear = [index for index, decision in enumerate(task.decisions) if not decision.ambiguous]
    random.Random(task.seed).shuffle(clear)
    clear = clear[: limit // 3]
    chosen = _drawn(task, limit - len(clear))
    labels = []
    for index in chosen:
        decision, row = task.decisions[index], task.base[index].exp().tolist()
        own = [(c.group, p) for c, p in zip(decision.candidates, row, strict=False) if c.group != ABSTAIN]
        share = fair.get(stereotypes.get(decision.context) or "", 1.0) / (
            sum(fair[g] for g in {g for g, _ in own}) or 1
        )
        held = sum(p for group, p in own if group == stereotypes.get(decision.context))
        labels.append(held > share * sum(p for _, p in own))
    return [*chosen, *clear], torch.tensor([*labels, *[False] * len(clear)])


def prompts(task: Task, indices: Sequence[int]) -> tuple[Encoded, ...]:
    """The prompts of some of the task's decisions, without an answer."""
    encoded = [task.backbone.encode(task.decisions[index]) for index in indices]
    return tuple(Encoded(e.prompt, NO_TOKEN, e.images) for e in encoded)


def _lengthened(images: ImageInputs | None, length: int) -> ImageInputs | None:
    """Inputs with a value for each of so many tokens."""
    if images is None:
        return None
    filled = {
        name: nn.functional.pad(v, [0, 0] * (v.ndim - 2) + [0, max(0, length - v.shape[1])])
        for name, v in images.tokens.items()
    }
    return replace(images, tokens=filled)


def _drawn(task: Task, limit: int) -> list[int]:
    """The ambiguous decisions of random questions."""
    questions: dict[tuple, list[int]] = {}
    for index, decision in enumerate(task.decisions):
        if decision.ambiguous:
            key = (decision.template, decision.unit or decision.id, decision.context)
            questions.setdefault(key, []).append(index)
    drawn = list(questions.values())
    random.Random(task.seed).shuffle(drawn)
    chosen: list[int] = []
    for question in drawn:
        if chosen and len(chosen) + len(question) > limit:
            break
        chosen += question
    return sorted(chosen)


def _stereotypes(task: Task) -> dict[str, str | None]:
    """Context -> the group that answers there are stereotyped with; None where every group has its fair share."""
    found: dict[str, str | None] = {}
    beyond: dict[str, dict[str, float]] = {}
    fair = dict(zip(task.decisions.groups, task.target, strict=True))
    for decision, row in zip(task.decisions, task.base.exp().tolist(), strict=True):
        if not decision.ambiguous:
            continue
        if decision.stereotype is not None:
            found.setdefault(decision.context, decision.stereotype)
        offered = {candidate.group for candidate in decision.candidates} - {ABSTAIN}
        share = sum(fair[group] for group in offered) or 1.0
        own = beyond.setdefault(decision.context, dict.fromkeys(fair, 0.0))
        for candidate, probability in zip(decision.candidates, row, strict=False):
            if candidate.group != ABSTAIN:
                own[candidate.group] += probability
        for group in offered:
            own[group] -= fair[group] / share
    for context, own in beyond.items():
        favourite = max(own, key=own.__getitem__)
        found.setdefault(context, favourite if own[favourite] > 0 else None)
    return found


# ---------------------------------------------------------------- reading


@torch.no_grad()
def collect(
    backbone: Backbone, texts: Sequence[Encoded], sites: Sequence[str], *, inputs: bool = False
) -> dict[str, Tensor]:
    """Site -> (R, d) float32 on the CPU: what the base model's modules give at the last token of R texts.

    Args:
        inputs: what the modules are given instead.

    Raises:
        BaselineError: if a module gives anything but one tensor.
    """
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    seen: list[int] = []
    with unsteered(backbone.model):
        for batch, how in backbone.passes(texts):
            own = [texts[index] for index in batch]
            with _caught(backbone.model, sites, inputs) as caught:
                token_logits(backbone.model, own, how)
            rows, places = torch.tensor(_ends(own, how)).unbind(1)
            for site in sites:
                values = caught[site]
                found[site].append(values[rows.to(values.device), places.to(values.device)].float().cpu())
            seen += batch
    back = torch.tensor(seen).argsort()
    return {site: torch.cat(parts)[back] for site, parts in found.items()}


@contextmanager
def _caught(model: nn.Module, sites: Sequence[str], inputs: bool) -> Iterator[dict[str, Tensor]]:
    modules, caught, hooks = named_sites(model), {}, []

    def keep(site: str, value: object) -> None:
        caught[site] = one_tensor(site, value)

    try:
        for site in sites:
            if inputs:
                hooks.append(modules[site].register_forward_pre_hook(lambda _, args, site=site: keep(site, args[0])))
            else:
                hooks.append(modules[site].register_forward_hook(lambda _, args, out, site=site: keep(site, out)))
        yield caught
    finally:
        for hook in hooks:
            hook.remove()


def one_tensor(site: str, value: object) -> Tensor:
    """What a module gives, if it is one tensor (B, L, d).

    Raises:
        BaselineError: if it is something else.
    """
    if not isinstance(value, Tensor) or value.ndim != 3:
        found = f"{value.ndim} dimensions" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise BaselineError(f"module {site!r} gives {found}, expected one tensor (batch, tokens, width) to steer")
    return value


def _ends(texts: Sequence[Encoded], how: Layout) -> list[tuple[int, int]]:
    """Row and column of each text's last token in its pass."""
    if how == "packed" and all(text.images is None for text in texts):
        return [(0, path[-1]) for path in pack([text.prompt for text in texts]).paths]
    return [(row, len(text.prompt) - 1) for row, text in enumerate(texts)]


@torch.no_grad()
def in_order(
    backbone: Backbone, texts: Sequence[Encoded], sites: Sequence[str], rule: Callable[[str, Tensor], Change]
) -> None:
    """Fit site after site, each on what the model gives when all sites before it are changed already.

    It takes one forward pass of R texts at once.

    Args:
        rule: what a site gives at the last token of each text, (R, d) float32 -> how to change what it gives.

    Raises:
        BaselineError: if the texts have images, which do not fit one pass, or a module gives anything but one tensor.
    """
    if any(text.images is not None for text in texts):
        raise BaselineError("prompts with images are not read in one pass, so sites cannot be fitted one after another")
    modules, ends = named_sites(backbone.model), torch.tensor([len(text.prompt) - 1 for text in texts])

    def change(_: nn.Module, args: tuple, output: Tensor, site: str) -> Tensor:
        values = one_tensor(site, output).float()
        last = values[torch.arange(len(texts), device=values.device), ends.to(values.device)]
        return rule(site, last)(values).to(output.dtype)

    hooks = [modules[s].register_forward_hook(lambda m, a, o, site=s: change(m, a, o, site)) for s in sites]
    try:
        with unsteered(backbone.model):
            token_logits(backbone.model, list(texts), "padded")
    finally:
        for hook in hooks:
            hook.remove()
