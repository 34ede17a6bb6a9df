"""Tiny models built from config classes: nothing is downloaded and a forward pass takes a millisecond."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dso.decisions.decision import Candidate, Decision, DecisionSet

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if not loop.last or add_generation_prompt %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FEMALE = ("Ann", "Eve", "Mia", "Zoe")
MALE = ("Bob", "Dan", "Leo", "Max")
JOBS = ("nurse", "pilot", "baker", "judge")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: any text can be encoded, names have several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = TEMPLATE
    return fast


def tiny_llama(seed: int = 0, width: int = 16, layers: int = 2) -> LlamaForCausalLM:
    """A random Llama with 2 * layers + 1 norms; weights large enough that its answers differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def role(job: str, first: str, second: str, *, split: str = "train", template: str = "t", order: int = 0) -> Decision:
    """One ambiguous decision about a woman and a man."""
    women = first if first in FEMALE else second
    men = second if first in FEMALE else first
    return Decision(
        id=f"{split}/{template}/{women}-{men}/{job}/{order}", context=job, kind="ambiguous", template=template,
        split=split, prompt=f"{first} and {second}: the {job} is", unit=f"{women}/{men}",
        stereotype="female" if job in ("nurse", "baker") else "male",
        candidates=(Candidate(text=f" {women}", group="female"), Candidate(text=f" {men}", group="male")),
    )  # fmt: skip


def fact(job: str, other: str, first: str, second: str, *, split: str = "train", swap: bool = False) -> Decision:
    """One unambiguous decision: who of the two has which job is stated."""
    right, wrong = (second, first) if swap else (first, second)
    return Decision(
        id=f"{split}/fact/{first}-{second}/{job}/{int(swap)}", context=job, kind="unambiguous", template="fact",
        split=split, prompt=f"{right} is {job}, {wrong} is {other}. The {job} is", unit=f"{first}/{second}",
        answer=int(swap),
        candidates=(Candidate(text=f" {first}", group="female"), Candidate(text=f" {second}", group="male")),
    )  # fmt: skip


def small_set(splits: tuple[str, ...] = ("train", "validation", "test")) -> DecisionSet:
    """4 jobs x 4 couples x 2 orders of ambiguous decisions a split, and 8 unambiguous ones."""
    decisions: list[Decision] = []
    for split in splits:
        for woman, man in zip(FEMALE, MALE, strict=True):
            for job in JOBS:
                decisions += [role(job, woman, man, split=split), role(job, man, woman, split=split, order=1)]
            for swap in (False, True):
                decisions.append(fact("nurse", "pilot", woman, man, split=split, swap=swap))
    return DecisionSet(tuple(decisions), ("female", "male"), "small")
