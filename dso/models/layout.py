"""Which layout a model's answers can be read from, found by running it.

Whether an architecture takes packed prefix trees (:mod:`dso.models.packing`), or padded rows, is not looked up but
measured when the model is taken in: a layout is used if it gives the log-probabilities of a simpler one but for
rounding. How much rounding there is, is measured too: by how far the same rows move when every number behind the
embeddings moves by one unit of the model's dtype. A layout that raises an error is not used.

All prompts end in the same token, so that what separates them came through attention. A wrong mask or position is an
error of half of that and more; rounding is 0.11 of it in a 30-layer model in bfloat16, a millionth in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from dso.errors import UserError, first_line
from dso.models.encoded import Encoded
from dso.models.scoring import Layout, score

ATTENTION = ("eager", "sdpa")  # that takes a mask of token to token
# What architectures raise at what they do not know.
REFUSALS = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, ImportError,
)  # fmt: skip
LEAST, MOST = 1e-3, 0.3  # error that passes for rounding, relative to what separates the probes
ROUNDING = 1.5  # times the rounding that was measured
# A packed row's mask replaces the one that the model would have cut off at these distances.
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size", "local_attention")


def positive(config: Any, name: str) -> int | None:
    """A whole number above 0 that a model's config states, or None."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None


def row_limit(config: Any) -> int | None:
    """Tokens of a packed row at most, so that what was measured holds for it: no window and no position table ends."""
    limits = [positive(config, name) for name in (*WINDOWS, "max_position_embeddings")]
    return min((limit for limit in limits if limit), default=None)


@torch.no_grad()
def find_layout(model: Any, limit: int | None) -> tuple[Layout, str]:
    """The best layout that gives a model's own answers, and why it is no better one ("" if it is the best).

    Args:
        limit: of :func:`row_limit`.

    Raises:
        UserError: if the model cannot be run at all.
    """
    encoded = probes(model.get_input_embeddings().num_embeddings, limit or 512)

    uneven = [replace(e, prompt=e.prompt[number % 4 :]) for number, e in enumerate(encoded)]

    def run(layout: Layout, asked: list[Encoded] = encoded) -> Tensor:
        table = score(model, asked, layout=layout, max_tokens=512, next_token=True).next_token
        assert table is not None  # it was asked for
        return table[: len(asked)]

    padded, reason = _try(lambda: run("padded"))
    if padded is not None:
        limit_of = _rounding(model, lambda: run("padded"), padded)
        attention = model.config.get_text_config()._attn_implementation
        if attention not in ATTENTION:
            packed, reason = (
                None,
                f"attention {attention!r} takes no mask of ours ({' and '.join(ATTENTION)} do)",
            )
        else:
            packed, reason = _try(lambda: run("packed"))
            if packed is not None and (fault := _differ(packed, padded, limit_of)) is None:
                return "packed", ""
            reason = reason or f"packed ones change its answers ({fault})"
    single, failure = _try(lambda: run("single", uneven))
    if single is None:
        raise UserError(f"{type(model).__name__} cannot be scored: {failure}")
    if padded is None:
        return "single", reason
    if fault := _differ(run("padded", uneven), single, limit_of):
        return "single", f"padded ones change its answers ({fault})"
    return "padded", reason


Company = Literal["any", "equal", "none"]


@torch.no_grad()
def find_company(model: Any, device: torch.device) -> Company:
    """Which prompts a model may answer side by side, each as it would by itself: any, padded on the left; those of
    equal length; none."""
    if _answered_apart(model, device, 3):
        return "any"
    return "equal" if _answered_apart(model, device, 1) else "none"


def _answered_apart(model: Any, device: torch.device, lengths: int) -> bool:
    """Whether prompts of so many lengths are answered side by side as each by itself."""
    prompts = [e.prompt[number % lengths :] for number, e in enumerate(probes(_vocabulary(model), 24))]
    longest = max(map(len, prompts))

    def run(rows: list[tuple[int, ...]]) -> Tensor:
        ids = torch.tensor([[*[0] * (longest - len(row)), *row] for row in rows])
        mask = torch.tensor([[*[0] * (longest - len(row)), *[1] * len(row)] for row in rows])
        if len(rows) == 1:
            ids, mask = ids[:, -len(rows[0]) :], mask[:, -len(rows[0]) :]
        return _second_tokens(model, ids.to(device), mask.to(device))

    together, _ = _try(lambda: run(prompts))
    if together is None:
        return False
    apart = torch.cat([run([prompt]) for prompt in prompts])
    return _differ(together, apart, _rounding(model, lambda: run(prompts), together)) is None


def _second_tokens(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities (N, 2V) of the next token and of the one behind token 5, which comes next."""
    from transformers import GenerationConfig, LogitsProcessorList

    config = GenerationConfig(
        max_new_tokens=2, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )

    def always(_: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([5], device=scores.device), 0.0)

    made = model.generate(
        ids, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList([always])
    )
    return torch.cat([logits.float().log_softmax(-1) for logits in made.logits], dim=1)


def _try(run: Callable[[], Tensor]) -> tuple[Tensor | None, str]:
    try:
        found = run()
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        return None, first_line(error)
    return (found, "") if bool(found.isfinite().any()) else (None, "it gives no finite numbers")


def _differ(one: Tensor, other: Tensor, limit: float) -> str | None:
    """By how much, if that is no rounding."""
    spread = (other - other.mean(0)).square().mean().sqrt()
    error = float((one - other).square().mean().sqrt() / spread)
    return None if error < limit else f"by {error:.2g} of what separates prompts, rounding by {limit:.2g} at most"


def _rounding(model: Any, run: Callable[[], Tensor], plain: Tensor) -> float:
    """The difference that passes for rounding in this model, relative to what separates the probes."""
    if model.dtype == torch.float32:
        return LEAST
    with _nudged(model):
        moved = run()
    spread = (plain - plain.mean(0)).square().mean().sqrt()
    noise = float((moved - plain).square().mean().sqrt() / spread)
    return min(MOST, max(LEAST, ROUNDING * noise))


@contextmanager
def _nudged(model: Any) -> Iterator[None]:
    """Every number behind the embeddings one unit of its dtype larger or smaller, so that all are rounded anew."""
    draw = torch.Generator().manual_seed(0)

    def nudge(_: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=draw) * 2 - 1
        return (output * (1 + torch.finfo(model.dtype).eps * signs.to(output.device))).to(output.dtype)

    hook = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        yield
    finally:
        hook.remove()


def _vocabulary(model: Any) -> int:
    return model.get_input_embeddings().num_embeddings


def probes(vocabulary: int, limit: int) -> list[Encoded]:
    """Up to 16 prompts of 6 tokens that differ in the fourth and fifth, together at most ``limit`` tokens.

    The more there are, the farther a token's place in the row is from its position in the prompt.
    """
    made = []
    for number in range(max(2, min(16, (limit - 3) // 4))):
        ids = [(7 * number + 5 * place + 11) % vocabulary for place in range(5)]
        prompt = (1 % vocabulary, 2 % vocabulary, 3 % vocabulary, *ids[:2], 4 % vocabulary)
        made.append(Encoded(prompt, ((ids[2],), (ids[3], ids[4]))))
    return made
