"""Prompts with images: what is read, what is remembered, what the model sees, and what is refused."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import assert_same, tiny
from cases import CASES, WORDS, pictures, scenes
from PIL import Image
from tiny import byte_tokenizer
from vision_models import FIRST, make_model, make_processor

from dso.decisions.decision import Candidate, Decision, DecisionError, DecisionSet
from dso.decisions.images import MAX_PIXELS, MIN_SIDE, ImageError, ImageMemory, find_image, open_image
from dso.errors import UserError
from dso.models.backbone import Backbone
from dso.models.embedded import ModelNotFound
from dso.models.loading import sees
from dso.steering.sites import resolve_sites

BYTES = byte_tokenizer()


@pytest.fixture
def llava() -> Backbone:
    return CASES["LLaVA"].backbone()


def ask(*images: str, prompt: str | None = None, letters: str = "AB", **fields) -> Decision:
    """A decision of one user's message; its images come first if the prompt does not say where."""
    words = "<image>" * len(images) + "Who?" if prompt is None else prompt
    candidates = tuple(Candidate(text=t, group=g) for t, g in zip(letters, "abc", strict=False))
    values = {"id": "d1", "context": "c", "kind": "ambiguous", "candidates": candidates, "images": images} | fields
    return Decision(prompt=({"role": "user", "content": words},), **values)


def png(path: Path, size: tuple[int, int] = (16, 16), mode: str = "RGB", seed: int = 0) -> str:
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(), mode).save(path) if mode != "P" else Image.new("P", size, 3).save(path)
    return str(path)


def header_only(path: Path, width: int, height: int) -> str:
    """A PNG that says how large it is and has next to no pixels."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    chunks = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return str(path)


# ---------------------------------------------------------------- image files


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_images_of_every_kind_become_rgb(tmp_path, mode):
    image = open_image(png(tmp_path / "a.png", (20, 10), mode))
    assert image.mode == "RGB" and image.size == (20, 10)


def test_images_are_turned_upright(tmp_path):
    image = Image.new("RGB", (20, 10), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(str(tmp_path / "a.jpg")).size == (10, 20)


def spoil(path: Path, how: str) -> str:
    good = Path(png(path)).read_bytes()
    if how == "cut":
        path.write_bytes(good[: len(good) // 2])
    elif how == "text":
        path.write_text("this is no image")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "checksum":
        place = good.index(b"IDAT") + 8
        path.write_bytes(good[:place] + b"\0\0\0\0" + good[place + 4 :])
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "missing":
        path.unlink()
    return str(path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "cannot be read, or is damaged"),
        ("checksum", "cannot be read, or is damaged"),
        ("text", "is damaged, or no image: its format is not recognised"),
        ("empty", "is damaged, or no image"),
        ("folder", "cannot be read, or is damaged: Is a directory"),
        ("missing", "cannot be read: No such file or directory"),
    ],
)
def test_what_is_no_image_is_refused_with_its_file_and_decision(llava, tmp_path, how, message):
    path = spoil(tmp_path / "face.png", how)
    with pytest.raises(DecisionError, match=rf"^decision 'd1': image '.*face\.png' {message}") as caught:
        llava.encode(ask(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match=message):
        llava.generate("<image>Who?", images=[path])


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1, 1), f"is 1 x 1 pixels, expected at least {MIN_SIDE} on each side"),
        ((MIN_SIDE - 1, 100), f"is {MIN_SIDE - 1} x 100 pixels, expected at least {MIN_SIDE}"),
        ((9000, 8000), f"is 9000 x 8000 pixels, expected at most {MAX_PIXELS // 10**6} million; shrink it"),
        ((20_000, 20_000), f"is too large: at most {MAX_PIXELS // 10**6} million pixels"),
    ],
)
def test_images_have_limits(llava, tmp_path, size, message):
    path = header_only(tmp_path / "face.png", *size)
    with pytest.raises(DecisionError, match=rf"'d1': image '.*face\.png' {message}"):
        llava.encode(ask(path))


def test_images_at_the_limit_are_taken(llava, tmp_path):
    assert len(llava.encode(ask(png(tmp_path / "a.png", (MIN_SIDE, MIN_SIDE)))).prompt) > 4
    assert MAX_PIXELS < Image.MAX_IMAGE_PIXELS  # below this, Pillow neither warns nor refuses


def test_what_the_processor_refuses_is_said(tmp_path):
    qwen = CASES["Qwen2-VL"].backbone()
    path = png(tmp_path / "line.png", (8 * 250, 8))
    with pytest.raises(
        DecisionError, match="'d1': the processor of 'Qwen2-VL' refuses .* aspect ratio must be smaller"
    ):
        qwen.encode(ask(path))


# ---------------------------------------------------------------- memory


def count_calls(backbone: Backbone) -> list[int]:
    """How many images each call of the image processor was given."""
    part, calls = backbone.vision._part, []
    processed = part._part.__class__.__call__

    class Counting(part._part.__class__):
        def __call__(self, images, **options):
            calls.append(sum(len(images) for images in images))
            return processed(self, images, **options)

    part._part.__class__ = Counting
    return calls


@pytest.mark.parametrize("name", ["LLaVA", "Idefics3", "InternVL", "Mllama"])
def test_images_are_processed_once(name):
    backbone = CASES[name].backbone()
    calls = count_calls(backbone)
    one = ask(pictures()["wide"], pictures()["tall"])
    other = replace(one, id="d2", prompt=({"role": "user", "content": "<image> and <image>: who is it?"},))
    first, again = backbone.encode(one), backbone.encode(replace(one, id="d3"))
    assert first is again and calls == [2]
    second = backbone.encode(other)  # other words, the same images
    assert calls == [2] and second.prompt != first.prompt
    with torch.no_grad():
        found = backbone.score([one, other], next_token=True, hidden=True)
    assert calls == [2]
    with torch.no_grad():  # what was remembered with one prompt is right with the other
        torch.testing.assert_close(found.log_probs[1:], CASES[name].backbone().score([other]).log_probs)
    turned = ask(pictures()["tall"], pictures()["wide"])
    backbone.encode(turned)
    assert calls == [2, 2]


def test_forgotten_images_are_processed_again():
    small = CASES["LLaVA"].backbone(image_memory=2 * 3 * 16 * 16 * 4)  # two images of one decision
    large = CASES["LLaVA"].backbone()
    calls = count_calls(small)
    decisions = [ask(pictures()[name], pictures()["square"], id=name) for name in ("wide", "tall")]
    with torch.no_grad():
        for _ in range(2):
            assert_same(small.score(decisions), large.score(decisions), 0)
            assert small.vision.memory.held <= small.vision.memory.limit
    assert len(calls) > 3
    none = CASES["LLaVA"].backbone(image_memory=0)
    with torch.no_grad():
        assert_same(none.score(decisions), large.score(decisions), 0)
    assert none.vision.memory.held == 0


def test_the_memory_forgets_what_was_not_used_for_longest(tmp_path):
    files = {name: (find_image(png(tmp_path / f"{name}.png")),) for name in "abc"}
    memory = ImageMemory(10)
    memory.put(files["a"], {"n": 1}, 4)
    memory.put(files["b"], {"n": 2}, 4)
    assert memory.get(files["a"]) == {"n": 1} and memory.held == 8
    memory.put(files["c"], {"n": 3}, 5)  # b goes
    assert [memory.get(files[name]) for name in "abc"] == [{"n": 1}, None, {"n": 3}] and memory.held == 9
    memory.put(files["a"], {"n": 4}, 5)
    assert memory.get(files["a"]) == {"n": 4} and memory.held == 10
    memory.put(files["b"], {"n": 5}, 11)
    assert memory.get(files["b"]) is None and memory.held == 10


@torch.no_grad()
def test_a_file_that_changes_is_read_anew(llava, tmp_path):
    decision = ask(png(tmp_path / "a.png", seed=1))
    before = llava.score([decision]).log_probs
    png(tmp_path / "a.png", seed=2)
    assert not torch.equal(llava.score([decision]).log_probs, before)


@torch.no_grad()
def test_a_file_that_vanishes_is_named_with_its_decision(tmp_path):
    backbone = CASES["LLaVA"].backbone(image_memory=0)
    encoded = backbone.encode(ask(png(tmp_path / "a.png")))
    (tmp_path / "a.png").unlink()
    with pytest.raises(DecisionError, match=r"^decision 'd1': image '.*a\.png' cannot be read"):
        encoded.images.load()


# ---------------------------------------------------------------- prompts


LLAVA_STYLE = (  # all images first, whatever the order of the items
    "{% for m in messages %}{{ m['role'].upper() }}: "
    "{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
STRINGS_ONLY = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[answer]"
SYSTEM_STRING = (  # a system message as a string, the others as items
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ 'SYS ' + m['content'] + ' ' }}{% else %}"
    "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' }}{% endfor %}"
    "{% endfor %}"
)


def templated(template: str | None) -> Backbone:
    processor = make_processor("LLaVA")
    processor.chat_template = template
    model = make_model("LLaVA", len(processor.tokenizer))
    return Backbone(model, processor.tokenizer, "tiny", processor=processor)


def rendered(backbone: Backbone, *messages: tuple[str, str]) -> str:
    prompt = tuple({"role": role, "content": content} for role, content in messages)
    images = tuple(pictures()["square"] for m in prompt for _ in range(m["content"].count("<image>")))
    return backbone.prompt_text(replace(ask(*images), prompt=prompt))


@pytest.mark.parametrize(
    ("template", "messages", "wanted"),
    [
        (LLAVA_STYLE, [("user", "<image>Who?")], "USER: <image>\nWho? ASSISTANT:"),
        # This template would move the images away from their words: they are written among them instead.
        (LLAVA_STYLE, [("user", "Left <image> right <image>?")], "USER: Left <image> right <image>? ASSISTANT:"),
        (LLAVA_STYLE, [("user", "Who?")], "USER: Who? ASSISTANT:"),
        (STRINGS_ONLY, [("user", "A <image> B")], "[user]A <image> B[answer]"),
        (STRINGS_ONLY, [("user", "A B")], "[user]A B[answer]"),
        (SYSTEM_STRING, [("system", "Be short."), ("user", "<image>Who?")], "SYS Be short. <image>Who?"),
    ],
)
def test_words_and_images_keep_their_places_in_every_template(template, messages, wanted):
    assert rendered(templated(template), *messages) == wanted


def test_a_last_assistant_message_is_continued(llava):
    messages = [("user", "<image>Who?"), ("assistant", "It is")]
    assert rendered(llava, *messages) == "<bos><user><image>Who?<assistant>It is"
    prompt = tuple({"role": role, "content": content} for role, content in messages)
    encoded = llava.encode(replace(ask(pictures()["wide"]), prompt=prompt))
    assert encoded.prompt[-5:] == tuple(llava.tokenizer("It is").input_ids)


def test_a_template_that_loses_words_is_refused():
    with pytest.raises(DecisionError, match="'d1': the chat template of 'tiny' leaves out or moves words or images"):
        rendered(templated(FORGETFUL), ("user", "<image>Who?"))
    with pytest.raises(DecisionError, match="'d1': the chat template of 'tiny' refuses the prompt: no system"):
        rendered(templated("{{ raise_exception('no system') }}"), ("user", "<image>Who?"))


def test_a_processor_without_a_chat_template_says_so():
    backbone = templated(None)
    with pytest.raises(
        DecisionError, match="'d1': the prompt is a chat, but the processor of 'tiny' has no chat templ"
    ):
        backbone.encode(ask(pictures()["wide"]))
    with pytest.raises(UserError, match="has no chat template; give the prompt as a string"):
        backbone.generate(({"role": "user", "content": "Who?"},))
    assert backbone.encode(replace(ask(pictures()["wide"]), prompt="<image>Who?")).prompt[:1] == (FIRST,)


@pytest.mark.parametrize(
    ("name", "slot"),
    [
        ("LLaVA", "<image>"),
        ("Qwen2.5-VL", "<|vision_start|><|image_pad|><|vision_end|>"),
        ("Gemma3-VL", "<start_of_image>"),
        ("Mllama", "<|image|>"),
        ("InternVL", "<IMG_CONTEXT>"),
    ],
)
def test_plain_strings_get_the_slots_of_the_family(name, slot):
    backbone = CASES[name].backbone(layout="padded")
    decision = replace(ask(pictures()["wide"]), prompt="See <image>. Who?")
    assert backbone.prompt_text(decision) == f"See {slot}. Who?"
    assert len(backbone.encode(decision).prompt) > 0


def test_every_image_has_its_tokens(llava):
    # A picture of 16 x 16 in patches of 8: 4 tokens each, of the number of the first special token.
    encoded = llava.encode(ask(pictures()["wide"], pictures()["tall"], prompt="A <image> B <image>?"))
    words = [tuple(llava.tokenizer(text).input_ids) for text in ("<bos><user>A ", " B ", "?<assistant>")]
    assert encoded.prompt == (*words[0], *[FIRST] * 4, *words[1], *[FIRST] * 4, *words[2])
    assert encoded.candidates == tuple(tuple(llava.tokenizer(letter).input_ids) for letter in "AB")


def test_prompts_are_never_truncated():
    processor = make_processor("LLaVA")
    processor.tokenizer.model_max_length = 8
    backbone = Backbone(make_model("LLaVA", len(processor.tokenizer)), processor.tokenizer, "tiny", processor=processor)
    long = ask(pictures()["wide"], prompt="<image>" + "x" * 480, letters="AB")  # 512 positions
    assert len(backbone.encode(long).prompt) == 1 + 6 + 4 + 480 + 11
    with pytest.raises(DecisionError, match="'d1': 542 tokens, but 'tiny' takes at most 512"):
        backbone.encode(replace(long, prompt=({"role": "user", "content": "<image>" + "x" * 520},)))


def test_a_decision_has_a_slot_for_each_image():
    for prompt, count in (("Who?", 1), ("<image>", 0), ("<image><image>Who?", 1)):
        slots = prompt.count("<image>")
        with pytest.raises(
            DecisionError, match=rf"'d1': the prompt has {slots} slot\(s\) for {count} image\(s\); write <i"
        ):
            ask(*["a.png"] * count, prompt=prompt)


def test_a_text_model_takes_no_images():
    backbone = Backbone(tiny("Llama"), byte_tokenizer(), "tiny")
    with pytest.raises(
        DecisionError, match="'d1': it has images, but 'tiny' is a text model; load a vision-language mo"
    ):
        backbone.score([ask(pictures()["wide"])])


# ---------------------------------------------------------------- scores and answers


@torch.no_grad()
def test_letters_of_one_prompt_share_one_row(llava):
    sizes, towers = [], []
    llava.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: sizes.append(output.shape[:2])
    )
    llava.model.model.vision_tower.register_forward_hook(lambda module, args, output: towers.append(args))
    decision = ask(pictures()["wide"], letters="ABC")
    llava.score([decision, replace(decision, id="d2")])
    length = len(llava.encode(decision).prompt)
    assert [tuple(size) for size in sizes] == [(2, length)] and len(towers) == 1
    sizes.clear()
    words = replace(decision, candidates=tuple(Candidate(text=t, group="ab"[t > "B"]) for t in ("An", "Ann", "Bo")))
    llava.score([words])  # "An" is the beginning of "Ann"
    assert [tuple(size) for size in sizes] == [(2, length + 2)]


@torch.no_grad()
@pytest.mark.parametrize("name", ["LLaVA", "Qwen2-VL", "Mllama", "SmolVLM"])
def test_decisions_with_and_without_images_may_be_mixed(name):
    backbone = CASES[name].backbone()
    mixed = [WORDS[0], CASES[name].decisions()[0], WORDS[3], *CASES[name].decisions()[1:]]
    for max_tokens in (10_000, 100, 1):
        backbone.max_tokens = max_tokens
        found = backbone.score(mixed, next_token=True)
        for row, decision in enumerate(mixed):
            alone = backbone.score([decision], next_token=True)
            count = len(decision.candidates)
            torch.testing.assert_close(found.log_probs[row, :count], alone.log_probs[0], atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(found.next_token[row], alone.next_token[0], atol=2e-5, rtol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["LLaVA", "Qwen2.5-VL", "Gemma3-VL"])
def test_image_tokens_are_never_generated(name):
    backbone = CASES[name].backbone()
    assert FIRST in backbone.vision.forbidden
    head = backbone.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: output.index_fill(-1, torch.tensor([FIRST]), 1e4))
    decision = CASES[name].decisions()[0]
    assert backbone.score([decision], next_token=True).next_token[0].argmax() == FIRST
    for prompt, images in ((decision.prompt, decision.images), ("Who?", ())):
        raw = {}
        generate = backbone.model.generate

        def record(*args, generate=generate, raw=raw, **options):
            raw["ids"] = generate(*args, **options)
            return raw["ids"]

        backbone.model.generate = record
        backbone.generate(prompt, images=images, max_new_tokens=5, min_new_tokens=5, suppress_tokens=[70])
        backbone.model.generate = generate
        new = raw["ids"][0, -5:].tolist()
        assert not set(new) & {*backbone.vision.forbidden, 70}


@torch.no_grad()
@pytest.mark.parametrize("name", ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"])
def test_positions_of_images_do_not_reach_the_next_text(name):
    # These models keep the last images' positions in themselves.
    backbone, fresh = CASES[name].backbone(), CASES[name].backbone()
    backbone.score(CASES[name].decisions())
    backbone.generate(CASES[name].decisions()[1].prompt, images=CASES[name].decisions()[1].images, max_new_tokens=3)
    assert backbone.generate("Who is it?", max_new_tokens=6) == fresh.generate("Who is it?", max_new_tokens=6)
    assert_same(backbone.score(WORDS), fresh.score(WORDS), 0)


@torch.no_grad()
def test_generation_sees_the_image(llava):
    texts = {llava.generate("<image>Who?", images=[path], max_new_tokens=6) for path in pictures().values()}
    assert len(texts) == 3
    with pytest.raises(UserError, match=r"the prompt has 1 slot\(s\) <image> for 2 image\(s\)"):
        llava.generate("<image>Who?", images=list(pictures().values())[:2])


@torch.no_grad()
def test_half_precision_gives_float32_scores():
    backbone = CASES["LLaVA"].backbone()
    wanted = backbone.score(CASES["LLaVA"].decisions(), next_token=True)
    half = Backbone(backbone.model.to(torch.bfloat16), backbone.tokenizer, "half", processor=make_processor("LLaVA"))
    found = half.score(CASES["LLaVA"].decisions(), next_token=True)
    assert found.log_probs.dtype == torch.float32
    assert_same(found, wanted, 0.4)


def test_the_tower_is_steered_only_if_asked_for():
    model = CASES["LLaVA"].backbone(layout="padded").model
    assert not [name for name in resolve_sites(model) if "vision" in name]
    tower = resolve_sites(model, [r"model\.vision_tower\..*norm\d"])
    assert list(tower) == [f"model.vision_tower.encoder.layers.{i}.layer_norm{n}" for i in (0, 1) for n in (1, 2)]


def test_a_set_with_images_is_written_and_read(tmp_path, llava):
    decisions = DecisionSet(tuple(scenes()), ("a", "b", "c"))
    decisions.write_jsonl(tmp_path / "set.jsonl")
    from dso.decisions.jsonl import read_jsonl

    assert read_jsonl(tmp_path / "set.jsonl").decisions == decisions.decisions


# ---------------------------------------------------------------- loading


def saved(folder: Path, name: str) -> Path:
    processor = make_processor(name)
    make_model(name, len(processor.tokenizer)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_folder_without_a_processor_is_refused(tmp_path):
    folder = saved(tmp_path / "model", "LLaVA")
    for file in ("processor_config.json", "preprocessor_config.json"):
        (folder / file).unlink(missing_ok=True)
    with pytest.raises(ModelNotFound, match="could not be loaded: .*processor"):
        Backbone.load(str(folder))


def test_a_package_that_the_processor_needs_is_named(tmp_path, monkeypatch):
    folder = saved(tmp_path / "model", "SmolVLM")
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    with pytest.raises(ModelNotFound, match="the processor needs a package that is not installed: .*num2words"):
        Backbone.load(str(folder))


def test_models_with_an_encoder_for_the_prompt_are_refused():
    from transformers import Florence2Config, LlamaConfig, LlavaConfig

    assert sees(LlavaConfig()) and not sees(LlamaConfig())
    with pytest.raises(
        UserError, match="florence2 has an encoder for the prompt; models that continue it are supported"
    ):
        sees(Florence2Config(is_encoder_decoder=True))
