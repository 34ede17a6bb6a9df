"""LoRA files of llama.cpp, read back by gguf's own reader; rows of queries and keys in llama.cpp's order."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from architectures import tiny
from exporting import INPUT, moved, slopes, steering_of

from dso.errors import UserError
from dso.exports.gguf_lora import FILE, write_gguf_lora
from dso.exports.lora import lora_plan

NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "gate_proj": "ffn_gate", "up_proj": "ffn_up"}


def read(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    reader = gguf.GGUFReader(folder / FILE)
    facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return facts, {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}


@pytest.mark.parametrize(("name", "known"), [("Qwen2", "qwen2"), ("Qwen3", "qwen3"), ("Gemma3", "gemma3")])
def test_a_file_holds_what_the_plan_holds_under_the_names_of_llama_cpp(name: str, known: str, tmp_path: Path) -> None:
    model = tiny(name)
    plan = lora_plan(moved(model, "scale", slopes=3), model, offsets=False, allow_partial=True)
    write_gguf_lora(plan, model, tmp_path / "a", 0.5)
    facts, tensors = read(tmp_path / "a")
    assert facts == {
        "general.architecture": known, "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 1.5,
    }  # fmt: skip
    assert len(tensors) == 2 * len(plan.layers)
    for layer, found in plan.layers.items():
        end = layer.rpartition(".")[2]
        place = "output" if end == "lm_head" else f"blk.{layer.split('.')[2]}.{NAMES[end]}"
        assert torch.equal(tensors[f"{place}.weight.lora_a"], found.a)
        assert torch.equal(tensors[f"{place}.weight.lora_b"], found.b)


def test_rows_of_llamas_queries_and_keys_are_interleaved_within_each_head(tmp_path: Path) -> None:
    """Heads of 8: the halves 0..3 and 4..7 of transformers are the even and the odd rows of llama.cpp."""
    model = tiny("Llama")
    with torch.no_grad():
        for end, rows in (("q", 16), ("k", 8), ("v", 8)):
            model.get_submodule(f"model.layers.0.self_attn.{end}_proj").weight[:, 2] = torch.arange(rows)
    plan = lora_plan(steering_of(model, [INPUT], a=slopes(c2=1.0)), model)
    write_gguf_lora(plan, model, tmp_path / "a")
    facts, tensors = read(tmp_path / "a")
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    assert facts["general.architecture"] == "llama"
    assert tensors["blk.0.attn_q.weight.lora_b"].flatten().tolist() == [*order, *(8 + row for row in order)]
    assert tensors["blk.0.attn_k.weight.lora_b"].flatten().tolist() == order
    assert tensors["blk.0.attn_v.weight.lora_b"].flatten().tolist() == [*range(8)]


def test_what_llama_cpp_cannot_hold_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = tiny("Llama")
    with pytest.raises(UserError, match="hold no offsets"):
        write_gguf_lora(lora_plan(moved(llama, "affine"), llama), llama, tmp_path / "a")
    phi = tiny("Phi3")
    with pytest.raises(UserError, match="'phi3' models are not known to --to gguf-lora, which knows llama"):
        write_gguf_lora(lora_plan(moved(phi, "scale"), phi), phi, tmp_path / "a")
    plan = lora_plan(moved(llama, "scale"), llama)

    def full(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", full)
    with pytest.raises(OSError, match="no space"):
        write_gguf_lora(plan, llama, tmp_path / "a")
    assert not [*tmp_path.iterdir()]
