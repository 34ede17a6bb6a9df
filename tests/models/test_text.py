"""What is scored is prompt + candidate, letter for letter; what a tokenizer or a chat template changes is refused."""

from __future__ import annotations

import pytest
import torch
from tiny import TEMPLATE, byte_tokenizer, tiny_llama
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dso.decisions.decision import Candidate, Decision, DecisionError
from dso.models.backbone import Backbone
from dso.models.scores import Scoring


def decide(prompt, *texts: str) -> Decision:
    candidates = tuple(Candidate(text=text, group=group) for text, group in zip(texts, "abcd", strict=False))
    return Decision(id="d1", context="c", kind="ambiguous", prompt=prompt, candidates=candidates)


def words_backbone(pre_tokenizer, *words: str, **special) -> Backbone:
    """A tokenizer of whole words, in which a blank belongs to the word behind it."""
    letters = sorted({letter for word in words for letter in word})
    vocabulary = {token: number for number, token in enumerate([*letters, *words])}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            vocabulary.setdefault(word[:end], len(vocabulary))
            if (pair := (word[: end - 1], word[end - 1])) not in merges:
                merges.append(pair)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Metaspace()
    return Backbone(tiny_llama(), PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special), "words")


def sentencepiece() -> Backbone:
    return words_backbone(pre_tokenizers.Metaspace(prepend_scheme="always"), "▁is", "▁named", "▁Mary", "▁John")


def spelled(backbone: Backbone, decision: Decision) -> tuple[list[str], list[list[str]]]:
    encoded, name = backbone.encode(decision), backbone.tokenizer.convert_ids_to_tokens
    return name(encoded.prompt), [name(candidate) for candidate in encoded.candidates]


def test_a_blank_at_the_prompt_s_end_belongs_to_the_candidates_if_the_tokenizer_says_so():
    backbone = sentencepiece()
    plain = spelled(backbone, decide("is named", " Mary", " John"))
    assert plain == (["▁is", "▁named"], [["▁Mary"], ["▁John"]])
    assert spelled(backbone, decide("is named ", "Mary", "John")) == plain
    scores = [
        backbone.score([decision]).log_probs
        for decision in (decide("is named", " Mary", " John"), decide("is named ", "Mary", "John"))
    ]
    assert torch.equal(*scores)


def test_two_blanks_stay_two():
    prompt, candidates = spelled(sentencepiece(), decide("is named ", " Mary", " John"))
    assert "".join([*prompt, *candidates[0]]) == "▁is▁named▁▁Mary"


def test_a_blank_that_the_tokenizer_drops_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<end>", rstrip=True, special=True)]})
    backbone = Backbone(tiny_llama(), tokenizer, "tiny")
    assert tokenizer("<end> Ann").input_ids == tokenizer("<end>Ann").input_ids
    backbone.encode(decide("Who?<end>", "Ann", "Bob"))
    with pytest.raises(DecisionError, match="'d1': the tokenizer reads .*<end> Ann' as .*<end>Ann'; write the prompt"):
        backbone.encode(decide("Who?<end>", " Ann", " Bob"))


def test_the_token_that_begins_a_text_is_not_doubled():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    from tokenizers.processors import TemplateProcessing

    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    backbone = Backbone(tiny_llama(), tokenizer, "tiny")
    assert tokenizer("<s>Who?").input_ids[:2] == [begin, begin]
    plain = backbone.encode(decide("Who?", " Ann", " Bob"))
    assert plain.prompt[0] == begin and plain.prompt.count(begin) == 1
    assert backbone.encode(decide("<s>Who?", " Ann", " Bob")) == plain


# ---------------------------------------------------------------- chat templates

USER = {"role": "user", "content": "Who?"}


def chat_backbone(template: str, **options) -> Backbone:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Backbone(tiny_llama(), tokenizer, "tiny", **options)


def test_a_message_that_the_template_drops_is_refused():
    users = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<user>{{ m['content'] }}{% endif %}{% endfor %}<assistant>"
    )
    backbone = chat_backbone(users)
    assert backbone.prompt_text(decide((USER,), "A", "B")) == "<user>Who?<assistant>"
    system = {"role": "system", "content": "Who"}  # words that stand in the user's message too
    with pytest.raises(
        DecisionError, match="'d1': the chat template of 'tiny' drops or changes the system message 'Who'"
    ):
        backbone.encode(decide((system, USER), "A", "B"))


def test_words_that_the_template_changes_are_refused():
    backbone = chat_backbone("<user>{{ messages[0]['content'] | replace('?', '') }}<assistant>")
    with pytest.raises(DecisionError, match="drops or changes the user message 'Who\\?'"):
        backbone.encode(decide((USER,), "A", "B"))


def test_a_blank_that_the_template_trims_from_the_prefill_is_put_back():
    trimming = TEMPLATE.replace("m['content'] }}", "m['content'] | trim }}")
    prefilled = (USER, {"role": "assistant", "content": "Answer: "})
    for template in (TEMPLATE, trimming):
        backbone = chat_backbone(template)
        assert backbone.prompt_text(decide(prefilled, "A", "B")).endswith("<assistant>Answer: ")
        encoded = backbone.encode(decide(prefilled, "A", "B"))
        assert backbone.tokenizer.decode(encoded.prompt + encoded.candidates[0]).endswith("<assistant>Answer: A")


def test_the_date_of_a_template_is_the_scoring_s():
    template = "{{ strftime_now('%d %b %Y') }}<user>{{ messages[0]['content'] }}<assistant>"
    decision = decide((USER,), "A", "B")
    assert chat_backbone(template).prompt_text(decision) == "26 Jul 2024<user>Who?<assistant>"
    later = chat_backbone(template, scoring=Scoring(date="2026-11-28"))
    assert later.prompt_text(decision) == "28 Nov 2026<user>Who?<assistant>"


def test_another_template_than_the_one_that_was_trained_with_is_refused():
    rule = chat_backbone(TEMPLATE).scoring
    assert len(rule.template) == 16
    chat_backbone(TEMPLATE, scoring=rule).encode(decide((USER,), "A", "B"))
    other = chat_backbone(TEMPLATE + " ", scoring=rule)
    other.encode(decide("Who?", "A", "B"))  # a text needs no template
    with pytest.raises(DecisionError, match="the chat template of 'tiny' is not the one that the scoring states"):
        other.encode(decide((USER,), "A", "B"))
