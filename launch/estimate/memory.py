"""How much memory the backward pass of one training step needs, found by running the step without numbers.

The model is run on the meta device by the code that training runs (:func:`dso.models.scoring.score` with the operators
attached, then the policy and the KL term), and what autograd saves for the backward pass is counted: every storage
once, parameters not. That is exact for the layers as they are written. Two things differ from a real device and are set
right here: attention, which has no fused kernel on the meta device (:class:`FusedAttention`), and the length of the
run, for the first decisions stand for all of a large batch (bytes grow with tokens).

With gradient checkpointing a layer keeps its input only and is run again in the backward pass, one layer at a time:
what is kept is everything outside of the layers, each layer's input, and one layer whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dso.models.encoded import Encoded
from dso.models.layout import row_limit
from dso.models.packing import pack, tree_size
from dso.models.scores import Scores
from dso.models.scoring import Layout, passes, score
from dso.steering.operators import SteeringOperator

ENOUGH = 2048  # tokens: what is run at most, unless one forward pass takes more


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes that the backward pass of a batch needs.

    Attributes:
        tokens: of the batch, as they pass through the model: shared prefixes once in packed rows, padding too.
        kept: saved by the forward pass.
        checkpointed: the same with gradient checkpointing.
        layer: saved by the largest single layer.
        share: of the batch that was run; the rest is scaled up from it.
    """

    tokens: int
    kept: int
    checkpointed: int
    layer: int
    share: float

    def __add__(self, other: Activations) -> Activations:
        """Of two batches that pass one after the other before the backward pass; their layers are run again in turn."""
        once = min(self.layer, other.layer)
        together = self.tokens + other.tokens
        return Activations(
            tokens=together,
            kept=self.kept + other.kept,
            checkpointed=self.checkpointed + other.checkpointed - once,
            layer=max(self.layer, other.layer),
            share=(self.tokens * self.share + other.tokens * other.share) / together,
        )


class FusedAttention(TorchFunctionMode):
    """Within it attention saves what fused kernels save: queries, keys, values, mask, output and one number a row.

    On the meta device it would be put together from plain operations, which save the attention weights of every head.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _fused(*args, **(kwargs or {}))
        if func in (Tensor.__bool__, Tensor.item) and args[0].is_meta:
            return True  # whether nothing is masked: sdpa then needs no mask, as with rows of equal length
        return func(*args, **(kwargs or {}))


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)  # kernels add the mask to the scores
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def activations(
    model: PreTrainedModel,
    operators: dict[str, SteeringOperator],
    encoded: Sequence[Encoded],
    *,
    max_tokens: int,
    layout: Layout = "packed",
    inputs: Callable[[Tensor], dict[str, Tensor]] | None = None,
    apart: bool = False,
) -> Activations:
    """What the backward pass of one step over a batch needs.

    Args:
        model: on the meta device, frozen.
        operators: site -> operator, on the meta device.
        encoded: the batch. Its first decisions are run, and their bytes are scaled to the batch.
        max_tokens: of one forward pass.
        layout: how decisions share one.
        inputs: further arguments of the model's forward for given token ids, as what a vision tower hands over.
        apart: each decision has a row to itself, as those with images have; the first then stands for all.
    """
    limit = row_limit(model.config.get_text_config())
    sizes = [tree_size(e.sequences()) for e in encoded]
    count, tokens = 1, sizes[0]
    while not apart and count < len(encoded) and tokens + sizes[count] <= max(max_tokens, ENOUGH):
        tokens += sizes[count]
        count += 1
    whole = sum(sizes) if apart else passed_tokens(encoded, layout, max_tokens, limit)
    share = (tokens if apart else passed_tokens(encoded[:count], layout, max_tokens, limit)) / whole
    with ExitStack() as stack:
        counter = stack.enter_context(_counting(model, operators))
        if inputs:
            stack.callback(model.register_forward_pre_hook(_adding(inputs), with_kwargs=True).remove)
        stack.enter_context(FusedAttention())
        scores = score(
            model,
            encoded[:count],
            layout="packed" if apart else layout,
            max_tokens=max_tokens,
            row_limit=None if apart else limit,
            next_token=True,
        )
        _loss(scores)
    inside = [bytes_ for layer, bytes_ in counter.saved.items() if layer is not None]
    kept, outside, largest = sum(counter.saved.values()), counter.saved[None], max(inside, default=0)
    return Activations(
        tokens=whole,
        kept=round(kept / share),
        # one layer is whole at a time, and one forward pass is run again at a time
        checkpointed=round((outside + counter.input_bytes) / share) + largest,
        layer=largest,
        share=share,
    )


def passed_tokens(encoded: Sequence[Encoded], layout: Layout, max_tokens: int, limit: int | None) -> int:
    """Tokens that pass through the model for a batch of prompts without images; ``limit`` is of a packed row."""
    total = 0
    for rows, how in passes(encoded, layout, max_tokens, limit):
        sequences = [sequence for row in rows for sequence in encoded[row].sequences()]
        if how == "packed":
            total += pack(sequences).input_ids.shape[1]
        else:
            total += sum(map(len, sequences)) if how == "single" else len(sequences) * max(map(len, sequences))
    return total


def _adding(inputs: Callable[[Tensor], dict[str, Tensor]]) -> Callable:
    return lambda module, args, kwargs: (args, kwargs | inputs(kwargs["input_ids"]))


def _loss(scores: Scores) -> Tensor:
    """What training makes of the scores, as far as it saves anything."""
    assert scores.next_token is not None  # asked for
    reference = torch.empty_like(scores.next_token)
    return scores.policy().exp().sum() + scores.kl(reference).mean()


class _Counter:
    """Bytes of the storages that are saved for the backward pass, by the layer that saves them."""

    def __init__(self, parameters: Iterator[Tensor]):
        self.saved: dict[int | None, int] = defaultdict(int)
        self.input_bytes = 0  # of all layers together; what several are given counts once
        self.layer: int | None = None
        self._entered = 0
        self._known = {p.untyped_storage()._cdata for p in parameters}
        self._inputs: set[int] = set()
        self._held: list[Any] = []  # or another storage could get the same address

    def pack(self, tensor: Tensor) -> Tensor:
        self.saved[self.layer] += self._new(tensor, self._known)
        return tensor

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.layer, self._entered = self._entered, self._entered + 1
        for value in (*args, *kwargs.values()):
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Tensor):
                    self.input_bytes += self._new(part, self._inputs)

    def leave(self, *_: Any) -> None:
        self.layer = None

    def _new(self, tensor: Tensor, known: set[int]) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata in known:
            return 0
        known.add(storage._cdata)
        self._held.append(storage)
        return storage.nbytes()


@contextmanager
def _counting(model: nn.Module, operators: dict[str, SteeringOperator]) -> Iterator[_Counter]:
    """Count within the block, with the operators attached as they are in training."""
    own = [p for operator in operators.values() for p in operator.parameters()]
    counter = _Counter(iter([*model.parameters(), *model.buffers(), *own]))

    def steer(operator: SteeringOperator) -> Callable:
        return lambda module, args, output: operator(output, 1.0)

    with ExitStack() as stack:
        for site, operator in operators.items():
            stack.callback(model.get_submodule(site).register_forward_hook(steer(operator)).remove)
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                stack.callback(module.register_forward_pre_hook(counter.enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(counter.leave).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor))
        yield counter
