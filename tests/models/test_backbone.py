"""Backbone: what is tokenised, which layout is used, what cannot be loaded, and generation."""

from __future__ import annotations

import json
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES, alone, assert_same, tiny
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, role, tiny_llama
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dso.decisions.decision import Candidate, Decision, DecisionError
from dso.errors import UserError
from dso.models.backbone import Backbone
from dso.models.embedded import ModelNotFound
from dso.models.encoded import Encoded
from dso.models.layout import probes
from dso.models.packing import pack

BYTES = byte_tokenizer()


def ids(text: str) -> tuple[int, ...]:
    """Token ids of the byte tokenizer, each letter looked up by itself (a blank has a letter that stands for it)."""
    return tuple(BYTES.convert_tokens_to_ids(["\u0120" if letter == " " else letter for letter in text]))


def decide(prompt, *texts: str, **fields) -> Decision:
    candidates = tuple(Candidate(text=text, group=group) for text, group in zip(texts, "abcd", strict=False))
    return Decision(id="d1", context="c", kind="ambiguous", prompt=prompt, candidates=candidates, **fields)


def custom(tokenizer: Tokenizer, **special) -> Backbone:
    return Backbone(tiny_llama(), PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special), "custom")


def bpe(*merged: str, letters: str = "abcdexy ") -> Tokenizer:
    """A tokenizer of letters and of pairs of them."""
    vocabulary = {token: number for number, token in enumerate([*letters, *merged])}
    return Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(pair) for pair in merged]))


# ---------------------------------------------------------------- which layout

# Measured by the self-check when the model is taken in: nothing about an architecture is written down elsewhere.
NOT_PACKED = ("Falcon-ALiBi", "Bloom", "MPT", "Mamba")
LAYOUTS = {name: "padded" if name in NOT_PACKED else "packed" for name in ARCHITECTURES}


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_equal_the_single_prompts_on_every_architecture(architecture):
    model = tiny(architecture)
    backbone = Backbone(model, byte_tokenizer(), "tiny", max_tokens=64)
    assert backbone.layout == LAYOUTS[architecture]
    decisions = [
        decide("Ann and Bob", " Ann", " Bob"),
        decide("Ann and Bob", " Bo", " An", "!"),
        decide("Ann and Bob and a prompt of more than 16 tokens: ", "Ann", "Bob"),  # beyond the sliding windows
        decide("Ann", "a", "bcd"),
    ]
    encoded = [
        Encoded(ids("Ann and Bob"), (ids(" Ann"), ids(" Bob"))),
        Encoded(ids("Ann and Bob"), (ids(" Bo"), ids(" An"), ids("!"))),
        Encoded(ids("Ann and Bob and a prompt of more than 16 tokens: "), (ids("Ann"), ids("Bob"))),
        Encoded(ids("Ann"), (ids("a"), ids("bcd"))),
    ]
    wanted = alone(model, encoded)
    assert_same(backbone.score(decisions, next_token=True, hidden=True), wanted)
    texts = ["Ann and Bob", "Ann and Bob and a prompt of more than 16 tokens: ", "Ann"]
    torch.testing.assert_close(backbone.next_token(texts), wanted.next_token[[0, 2, 3]], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("architecture", ["MPT", "Bloom", "Llama", "Gemma2"])
def test_the_self_check_is_not_fooled_by_small_weights(architecture):
    small = "initializer_range"
    assert Backbone(tiny(architecture, **{small: 0.02}), byte_tokenizer()).layout == LAYOUTS[architecture]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_self_check_allows_for_half_precision(dtype):
    assert Backbone(tiny("Llama").to(dtype), byte_tokenizer()).layout == "packed"
    assert Backbone(tiny("MPT").to(dtype), byte_tokenizer()).layout == "padded"


def test_the_probes_of_the_self_check_fill_a_row_as_far_as_it_may_be():
    for row_limit, count in ((512, 16), (67, 16), (66, 15), (16, 3), (8, 2)):
        made = probes(258, row_limit)
        row = pack([sequence for probe in made for sequence in probe.sequences()])
        # Three shared tokens; three more of each prompt and the first of its longer candidate.
        assert (len(made), row.input_ids.shape[1]) == (count, 3 + 4 * count)
        assert {probe.prompt[-1] for probe in made} == {4}


@torch.no_grad()
def test_eager_attention_is_packed_too():
    model = tiny("Llama", attn_implementation="eager")
    backbone = Backbone(model, byte_tokenizer())
    assert backbone.layout == "packed"
    encoded = [Encoded(ids("Ann and"), (ids(" Ann"), ids(" Bob")))]
    assert_same(backbone.score([decide("Ann and", " Ann", " Bob")]), alone(model, encoded))


def test_an_attention_that_takes_no_mask_of_ours_is_not_packed_and_that_is_said():
    AttentionInterface.register("own", sdpa_attention_forward)
    AttentionMaskInterface.register("own", sdpa_mask)
    model = tiny("Llama", attn_implementation="own")
    backbone = Backbone(model, byte_tokenizer(), "tiny")
    assert backbone.layout == "padded"
    assert backbone.layout_line() == (
        "tiny: prompts are scored in padded rows, not packed: attention 'own' takes no mask of ours (eager and sdpa do)"
    )
    assert Backbone(tiny("Llama"), byte_tokenizer()).layout_line() is None


@torch.no_grad()
def test_the_layout_may_be_chosen_by_hand():
    decisions = [decide("Ann and Bob", " Ann", " Bob"), decide("Ann", "a", "bcd")]
    packed, padded, single = (
        Backbone(tiny_llama(), byte_tokenizer(), layout=layout).score(decisions, next_token=True, hidden=True)
        for layout in ("packed", "padded", "single")
    )
    assert_same(packed, padded)
    assert_same(single, padded)
    with pytest.raises(UserError, match="layout is 'dense', expected packed, padded or single"):
        Backbone(tiny_llama(), byte_tokenizer(), layout="dense")


def test_the_model_is_frozen_and_gradients_pass_through():
    backbone = Backbone(tiny_llama().train(), byte_tokenizer())
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not backbone.score([role("nurse", "Ann", "Bob")]).log_probs.requires_grad
    norm = backbone.model.model.norm.weight.requires_grad_(True)
    backbone.score([role("nurse", "Ann", "Bob")]).log_probs.sum().backward()
    assert norm.grad.abs().sum() > 0
    assert all(p.grad is None for p in backbone.model.parameters() if p is not norm)


# ---------------------------------------------------------------- what is tokenised


def test_candidates_follow_the_prompt(backbone):
    encoded = backbone.encode(decide("Bo and Ann. The nurse is", " Ann", " Bo"))
    assert encoded == Encoded(ids("Bo and Ann. The nurse is"), (ids(" Ann"), ids(" Bo")))


def test_candidates_are_tokenised_in_their_place():
    # Alone, this tokenizer begins every text with a blank; behind a prompt the candidate has none.
    tokenizer = bpe(" a", "ab")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False)
    backbone = custom(tokenizer)
    number = tokenizer.token_to_id
    assert backbone.tokenizer("ab", add_special_tokens=False).input_ids == [number(" a"), number("b")]
    encoded = backbone.encode(decide("xy", "ab", " c"))
    assert encoded.prompt == (number(" "), number("x"), number("y"))
    assert encoded.candidates == ((number("ab"),), (number(" "), number("c")))


def test_where_letters_of_both_are_joined_the_candidates_begin_earlier():
    tokenizer = bpe("xa")
    number = tokenizer.token_to_id
    backbone = custom(tokenizer)
    assert backbone.tokenizer("yxab").input_ids == [number("y"), number("xa"), number("b")]
    encoded = backbone.encode(decide("yx", "ab", "cb"))
    assert encoded.prompt == (number("y"),)
    assert encoded.candidates == ((number("xa"), number("b")), (number("x"), number("c"), number("b")))
    with pytest.raises(DecisionError, match="'d1': the tokenizer joins the prompt 'x' with its candidates to one word"):
        backbone.encode(decide("x", "ab", "cb"))


def test_special_tokens_stand_before_the_text_and_never_behind():
    tokenizer = bpe()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    begin, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)]
    )
    backbone = custom(tokenizer, bos_token="<s>", eos_token="</s>")
    a, b, c, x = map(tokenizer.token_to_id, "abcx")
    assert backbone.encode(decide("x", "a", "bc")) == Encoded((begin, x), ((a,), (b, c)))
    # An end token that the prompt itself ends with stays.
    assert backbone.encode(decide("x</s>", "a", "bc")).prompt[:3] == (begin, x, end)
    backbone.tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    chat = ({"role": "user", "content": "x"},)
    assert backbone.encode(decide(chat, "a", "bc")) == Encoded((begin, x), ((a,), (b, c)))


def test_chat_prompts_go_through_the_template(backbone):
    chat = ({"role": "system", "content": "Short."}, {"role": "user", "content": "Who?"})
    decision = decide(chat, " Ann", " Bob")
    rendered = "<system>Short.<user>Who?<assistant>"
    assert backbone.prompt_text(decision) == rendered
    encoded = backbone.encode(decision)
    assert BYTES.decode(encoded.prompt) == rendered
    assert encoded.candidates == (ids(" Ann"), ids(" Bob"))


def test_a_last_assistant_message_is_continued(backbone):
    chat = ({"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The nurse is"})
    decision = decide(chat, " Ann", " Bob")
    assert backbone.prompt_text(decision) == "<user>Who?<assistant>The nurse is"
    assert BYTES.decode(backbone.encode(decision).prompt) == "<user>Who?<assistant>The nurse is"


def test_the_cache_tells_decisions_apart_by_what_the_model_sees(backbone):
    one, other = decide("Who?", " Ann", " Bob"), decide("Who?", " Ann", " Eve")
    assert backbone.encode(one) is backbone.encode(replace(one, id="d2", context="other"))
    assert backbone.encode(other).candidates == (ids(" Ann"), ids(" Eve"))


CHAT = ({"role": "user", "content": "Who?"},)


def test_a_chat_without_a_template_is_refused(backbone):
    backbone.tokenizer.chat_template = None
    with pytest.raises(DecisionError, match="'d1'.*the prompt is a chat, but the tokenizer of 'tiny' has no chat temp"):
        backbone.encode(decide(CHAT, " Ann", " Bob"))
    with pytest.raises(UserError, match="no chat template"):
        backbone.generate(CHAT)


def test_a_template_that_refuses_is_quoted(backbone):
    backbone.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DecisionError, match="'d1': the chat template of 'tiny' refuses .* System role not supported"):
        backbone.encode(decide(CHAT, " Ann", " Bob"))


def test_candidates_of_the_same_tokens_are_refused():
    tokenizer = bpe()
    tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(DecisionError, match="'d1': two candidates have the same tokens"):
        custom(tokenizer).encode(decide("x", "ab", "Ab"))


def test_texts_without_tokens_are_refused():
    backbone = custom(bpe())
    for decision in (decide("x", "ab", "zz"), decide("zz", "a", "b")):
        with pytest.raises(DecisionError, match="'d1': the tokenizer gives no tokens"):
            backbone.encode(decision)
    with pytest.raises(UserError, match="text 'zz': the tokenizer gives no tokens"):
        backbone.next_token(["x", "zz"])


@torch.no_grad()
def test_a_decision_longer_than_the_context_is_refused():
    backbone = Backbone(tiny("GPT-2"), byte_tokenizer(), "tiny")  # 128 positions
    assert backbone.score([decide("x" * 126, "abc", "d")]).log_probs.isfinite().all()
    with pytest.raises(DecisionError, match="'d1': 129 tokens, but 'tiny' takes at most 128"):
        backbone.encode(decide("x" * 127, "abc", "d"))
    with pytest.raises(UserError, match="129 tokens"):
        backbone.next_token(["x" * 129])


def test_images_need_a_model_that_sees(backbone):
    with pytest.raises(DecisionError, match="'d1': it has images, but 'tiny' is a text model; load a vision-lang"):
        backbone.encode(decide("<image> Who?", " A", " B", images=("a.png",)))
    with pytest.raises(UserError, match="'tiny' is a text model"):
        backbone.generate("<image> Who?", images=("a.png",))
    with pytest.raises(UserError, match=r"1 slot\(s\) <image> for 0 image"):
        backbone.generate("<image> Who?")


# ---------------------------------------------------------------- loading


@torch.no_grad()
def test_a_folder_is_loaded_with_its_very_weights(model_folder, monkeypatch):
    backbone = Backbone.load(str(model_folder))
    assert (backbone.name, backbone.revision, backbone.device.type) == (str(model_folder), None, "cpu")
    for name, value in tiny_llama().state_dict().items():
        assert torch.equal(backbone.model.state_dict()[name], value)
    assert backbone.tokenizer("Ann", add_special_tokens=False).input_ids == list(ids("Ann"))
    monkeypatch.setenv("HOME", str(model_folder.parent))
    assert Backbone.load(f"~/{model_folder.name}", dtype="bfloat16", max_tokens=9).model.dtype == torch.bfloat16


def test_a_name_that_can_be_nothing_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail("went to the network"))
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    reason = r"no such folder, not embedded \(smollm2-135m, gemma3-270m, vlm-scenes\), and no Hub id"
    for name in ("smollm", "/no/such/folder", "./x", "~/no-such", "a/b/c", "a b/c", "../x/y"):
        with pytest.raises(ModelNotFound, match=reason):
            Backbone.load(name)
    assert time.perf_counter() - start < 5
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(ModelNotFound, match="'owner/name': no config.json in that folder"):
        Backbone.load("owner/name")


def test_a_hub_that_does_not_answer_is_said_at_once(monkeypatch):
    def refuse(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    start = time.perf_counter()
    with pytest.raises(ModelNotFound, match="'no-such-owner/no-such-model': no such folder, and not to be had from"):
        Backbone.load("no-such-owner/no-such-model")
    assert time.perf_counter() - start < 10


def test_the_revision_is_asked_for(monkeypatch):
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        raise FileNotFoundError("no revision r2")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ModelNotFound, match="'owner/name'.*no revision r2"):
        Backbone.load("owner/name", revision="r2")
    assert asked == [("owner/name", "r2", ["config.json"])]


def damaged(folder, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    change(copy)
    return str(copy)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def forget_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 8}))


def other_type(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, "could not be loaded"),
        (forget_a_tensor, "lacks 1 of its weights, 'model.layers.1.mlp.up_proj.weight'"),
        (other_shape, "could not be loaded"),
        (other_type, "could not be loaded.*no-such-type"),
        (lambda folder: (folder / "config.json").write_text("{"), "could not be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "could not be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "could not be loaded"),
    ],
)
def test_a_damaged_folder_is_refused(model_folder, tmp_path, change, message):
    with pytest.raises(ModelNotFound, match=message) as caught:
        Backbone.load(damaged(model_folder, tmp_path, change))
    assert "\n" not in str(caught.value)


def test_an_unknown_dtype_is_refused(model_folder):
    with pytest.raises(UserError, match="dtype is 'int8', expected one of float32, bfloat16, float16"):
        Backbone.load(str(model_folder), dtype="int8")


def test_what_the_loader_takes_is_passed_on(model_folder):
    eager = Backbone.load(str(model_folder), attn_implementation="eager")
    assert eager.model.config._attn_implementation == "eager"
    placed = Backbone.load(str(model_folder), device_map={"": "cpu"})
    assert placed.device.type == "cpu" and placed.layout == "packed"
    with pytest.raises(ModelNotFound, match="could not be loaded.*nowhere"):
        Backbone.load(str(model_folder), device_map="nowhere")
    with pytest.raises(UserError, match="device 'cpu' and a device_map or quantization_config: the loader places"):
        Backbone.load(str(model_folder), device="cpu", device_map="auto")
    with pytest.raises(UserError, match="device 'cuda:9' cannot be used"):
        Backbone.load(str(model_folder), device="cuda:9")


# ---------------------------------------------------------------- generation


@torch.no_grad()
def greedy(model, prompt: tuple[int, ...], count: int) -> str:
    """The most probable token, again and again, each from a whole forward pass."""
    sequence = list(prompt)
    for _ in range(count):
        sequence.append(int(model(torch.tensor([sequence])).logits[0, -1].argmax()))
        if sequence[-1] == 1:
            break
    return BYTES.decode(sequence[len(prompt) :], skip_special_tokens=True)


def test_generation_continues_a_text(backbone):
    assert backbone.generate("Ann and", max_new_tokens=8) == greedy(backbone.model, ids("Ann and"), 8)
    assert backbone.generate("Ann and", max_new_tokens=1) == greedy(backbone.model, ids("Ann and"), 1)


def test_generation_answers_a_chat(backbone):
    rendered = tuple(BYTES("<user>Who?<assistant>").input_ids)
    assert backbone.generate(CHAT, max_new_tokens=6) == greedy(backbone.model, rendered, 6)


def test_generation_passes_options_on(backbone):
    torch.manual_seed(0)
    sampled = {backbone.generate("Ann", max_new_tokens=4, do_sample=True, temperature=5.0) for _ in range(8)}
    assert len(sampled) > 1
    with pytest.raises(UserError, match="the prompt is empty"):
        backbone.generate("")


def test_several_answers_are_a_list(backbone):
    torch.manual_seed(0)
    several = backbone.generate("Ann", max_new_tokens=4, do_sample=True, temperature=5.0, num_return_sequences=3)
    assert isinstance(several, list) and len(several) == 3 and len({*several}) > 1
    with pytest.raises(UserError, match="generate returns text; for anything else call the model's own generate"):
        backbone.generate("Ann", return_dict_in_generate=True)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["packed", "padded", "single"])
def test_several_threads_score_at_once(layout):
    backbone = Backbone(tiny_llama(), byte_tokenizer(), layout=layout)
    decisions = [role("nurse", "Ann", "Bob"), decide("A longer prompt: ", "Ann", "Bob"), role("pilot", "Eve", "Dan")]
    wanted = [backbone.score([decision], hidden=True) for decision in decisions]

    def ask(number: int) -> bool:
        place = number % len(decisions)
        found = backbone.score([decisions[place]], hidden=True)
        return torch.equal(found.log_probs, wanted[place].log_probs) and torch.equal(found.hidden, wanted[place].hidden)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(120)))
