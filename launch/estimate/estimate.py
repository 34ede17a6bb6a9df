"""What a training run will need, worked out from its config: memory of one process, files, decisions.

No weight is read and nothing is written. What is exact and what is crude is said beside each number; all sizes are in
bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save

from dso.decisions.decision import Decision, DecisionSet
from dso.decisions.images import open_image
from dso.decisions.sampler import BlockSampler, divide
from dso.evaluation.evaluator import CHUNK
from dso.evaluation.neutral import anchor_texts
from dso.models.backbone import Backbone
from dso.models.encoded import Encoded
from dso.models.scoring import Layout
from dso.steering.operators import SteeringOperator, make_operator
from dso.steering.sites import resolve_sites
from launch.config.schema import ConfigError, TrainConfig
from launch.estimate.architecture import Architecture
from launch.estimate.layout import expected_layout
from launch.estimate.memory import Activations, activations
from launch.estimate.vision import Sight, sight
from launch.run.constants import ANCHORS

# Pictures of published sets, for when their files are not at hand: a person each (width, height in pixels).
PICTURES = {"socialcounterfactuals": (512, 512), "genderbias-vl": (1024, 1024)}
TEXT_TOKENS = 64  # of a prompt where no decision is at hand: a sentence or two, a question and a chat template
CHARACTERS = 4  # a token, where no tokenizer is at hand
CONTEXT = 800_000_000  # the accelerator's own context and what its allocator cannot hand out again
LIVE = 1_000_000_000  # DeepSpeed's default of stage3_max_live_parameters


@dataclass(frozen=True, slots=True)
class Launch:
    """How the run is started; a step has as many decisions as ``ranks`` times ``parts`` at least.

    Attributes:
        ranks: processes, one an accelerator.
        stage: of ZeRO.
        parts: in which a process learns its share of a step, one after the other.
        live: weights that ZeRO-3 gathers at most at a time.
    """

    ranks: int = 1
    stage: int = 0
    parts: int = 1
    live: int = LIVE


@dataclass(frozen=True, slots=True)
class Batch:
    """The decisions of one process and part of a step.

    Attributes:
        size: how many.
        encoded: their tokens, or stand-ins of a length that is assumed.
        sight: what a decision's images add.
        source: where the lengths are from, for people.
        layout: how they share a forward pass.
        anchors: the tokens of all anchor texts.
        texts: of those, how many pass with it.
    """

    size: int
    encoded: list[Encoded]
    sight: Sight
    source: str
    layout: Layout = "packed"
    anchors: list[Encoded] = field(default_factory=list)
    texts: int = 0

    @property
    def positions(self) -> float:
        """Answer positions a decision: 1 where answers have one token, more where they have several."""
        return _positions(self.encoded) / len(self.encoded)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the accelerator of one process.

    Attributes:
        weights: of the backbone, as far as this process holds them.
        gathered: weights of others that ZeRO-3 fetches for a pass, at most.
        state: operators, gradients, the optimiser's moments and step sizes, the best operators.
        step: activations of a training step.
        backward: what the backward pass needs besides (crude).
        tower: of the vision tower in one forward pass (crude).
        references: of the validation split, kept from the first validation on.
        evaluation: of a chunk that is measured, between training steps (crude).
        context: of the accelerator itself (crude).
    """

    weights: int
    gathered: int
    state: int
    step: Activations
    backward: int
    tower: int
    references: int | None
    evaluation: int
    context: int

    def total(self, checkpointing: bool) -> int:
        """The most at one time."""
        step = (self.step.checkpointed if checkpointing else self.step.kept) + max(self.backward, self.tower)
        resident = self.weights + self.gathered + self.state + (self.references or 0) + self.context
        return resident + max(step, self.evaluation + self.tower)


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What is trained.

    Attributes:
        sites: site -> width.
        operators: site -> operator, on the meta device.
        count: coefficients of all.
        checkpoint: size of the tensors' file of a saved steering, exactly.
    """

    sites: dict[str, int]
    operators: dict[str, SteeringOperator]
    count: int
    checkpoint: int


def coefficients(config: TrainConfig, architecture: Architecture) -> Coefficients:
    """The operators of a config, sited by the code that training sites them by.

    Raises:
        ConfigError: if a pattern names no site, or the rank does not fit.
    """
    wanted = config.steering
    try:
        sites = resolve_sites(architecture.model, wanted.sites and list(wanted.sites))
        with torch.device("meta"):
            operators = {site: make_operator(wanted.operator, width, wanted.rank) for site, width in sites.items()}
    except ValueError as error:
        raise ConfigError(str(error), "steering") from error
    named = {f"{site}.{key}": p for site, operator in operators.items() for key, p in operator.named_parameters()}
    file = save({key: torch.zeros(p.shape) for key, p in named.items()})
    return Coefficients(sites, operators, sum(p.numel() for p in named.values()), len(file))


def batch(config: TrainConfig, architecture: Architecture, training: DecisionSet | None, launch: Launch) -> Batch:
    """What one process passes through the model at a time."""
    backbone = _backbone(config, architecture)
    found = _lengths(config, architecture, training, launch, backbone)
    anchors = _anchors(config, backbone)
    found = replace(found, anchors=anchors, texts=math.ceil(min(ANCHORS, len(anchors)) / launch.ranks))
    if architecture.vision_config is not None:
        return replace(found, layout="padded")
    return replace(found, layout=expected_layout(architecture.model.config, config.model.attn_implementation))


def _anchors(config: TrainConfig, backbone: Backbone | None) -> list[Encoded]:
    texts = anchor_texts(config.constraints.anchors)
    if backbone is None:
        return [_stand_in(n, 1, [math.ceil(len(text) / CHARACTERS)]) for n, text in enumerate(texts)]
    return backbone.encode_texts(texts, start=False)


def _lengths(
    config: TrainConfig,
    architecture: Architecture,
    training: DecisionSet | None,
    launch: Launch,
    backbone: Backbone | None,
) -> Batch:
    whole, shares = config.decisions, launch.ranks * launch.parts
    if training is None:
        size = math.ceil(whole / shares)
        seen = sight(architecture, _published_images(config))
        encoded = [_stand_in(number, TEXT_TOKENS + seen.tokens, (1, 1)) for number in range(size)]
        return Batch(size, encoded, seen, f"assumed: {TEXT_TOKENS} tokens of text a decision, answers of one token")
    indices = BlockSampler(training, config.train.ambiguous, config.train.unambiguous, config.train.seed).draw()
    drawn = [training[int(index)] for index in indices]
    blocks: dict[tuple[str, ...], int] = {}  # as envs.task has them: a process gets whole ones
    numbers = [blocks.setdefault((d.template, d.unit) if d.unit else (d.id,), len(blocks)) for d in drawn]
    decisions = [drawn[place] for place in max(divide(numbers, shares), key=len)]
    size = len(decisions)
    most = max(decisions, key=lambda decision: len(decision.images))
    seen = sight(architecture, [open_image(path).size for path in most.images])
    if backbone is None or seen.tokens:
        encoded = [_by_length(number, decision, seen.tokens) for number, decision in enumerate(decisions)]
        return Batch(size, encoded, seen, f"a first batch, {CHARACTERS} characters a token: no tokenizer is at hand")
    return Batch(size, [backbone.encode(decision) for decision in decisions], seen, "a first batch, tokenised")


def memory(
    config: TrainConfig,
    architecture: Architecture,
    learned: Coefficients,
    part: Batch,
    launch: Launch,
    validation: int | None,
) -> Memory:
    """What one process needs on its accelerator.

    Args:
        validation: decisions that are validated on; None if not known.
    """
    row = reference_bytes(architecture, part.positions)
    step = activations(
        architecture.model,
        learned.operators,
        part.encoded,
        max_tokens=config.model.max_tokens,
        layout=part.layout,
        inputs=part.sight.inputs,
        apart=part.sight.tokens > 0,
    )
    texts = part.anchors[: part.texts]
    positions = part.size * part.positions + _positions(texts)
    together = min(part.size, max(1, config.model.max_tokens * part.size // step.tokens))  # of one forward pass
    if texts:
        step += activations(
            architecture.model, learned.operators, texts, max_tokens=config.model.max_tokens, layout=part.layout
        )
    weights = architecture.weight_bytes
    sharded = launch.stage == 3
    width = architecture.model.dtype.itemsize
    return Memory(
        weights=math.ceil(weights / launch.ranks) if sharded else weights,
        gathered=min(weights - weights // launch.ranks, launch.live * width) if sharded else 0,
        state=6 * 4 * learned.count,
        step=step,
        backward=step.layer + round(3 * reference_bytes(architecture, positions)),
        tower=together * part.sight.tower_bytes,
        references=None if validation is None else round(validation * row),
        evaluation=round(5 * CHUNK * row),
        context=0 if config.model.device == "cpu" else CONTEXT,
    )


def reference_bytes(architecture: Architecture, positions: float) -> float:
    """Float32 log-probabilities: a row of the vocabulary an answer position."""
    return 4 * architecture.vocabulary * positions


def host_references(architecture: Architecture, part: Batch, decisions: int) -> int:
    """What every process keeps of the base model: its distributions of so many training decisions and all anchors."""
    return round(reference_bytes(architecture, decisions * part.positions + _positions(part.anchors)))


def _positions(encoded: Sequence[Encoded]) -> int:
    return sum(len(e.answer_positions()) for e in encoded)


def _published_images(config: TrainConfig) -> list[tuple[int, int]]:
    """Sizes of the images of a decision about two people: one of both beside each other, or one of each."""
    if config.data.set not in PICTURES:
        return []
    width, height = PICTURES[config.data.set]
    return [(width, height)] * 2 if config.data.options.get("layout") == "two" else [(2 * width, height)]


def _stand_in(number: int, prompt: int, candidates: Sequence[int]) -> Encoded:
    """Tokens that no other decision begins with, so that nothing is shared; their values do not matter."""
    start = (number + 1) * 1_000_000
    texts = (tuple(start - 1000 * (place + 1) + i for i in range(n)) for place, n in enumerate(candidates))
    return Encoded(tuple(range(start, start + prompt)), tuple(texts))


def _by_length(number: int, decision: Decision, images: int) -> Encoded:
    lengths = [max(1, round(len(candidate.text) / CHARACTERS)) for candidate in decision.candidates]
    return _stand_in(number, images + max(1, math.ceil(len(decision.text) / CHARACTERS)), lengths)


def _backbone(config: TrainConfig, architecture: Architecture) -> Backbone | None:
    """What tokenises as the run will; None if there is no tokenizer beside the shapes."""
    folder: Path | None = architecture.folder
    if folder is None or not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    return Backbone(architecture.model, tokenizer, config.model.name, layout="packed")
