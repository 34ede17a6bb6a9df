"""A steering as a LoRA file of llama.cpp, whose server takes the strength with each request.

    llama-server -m model.gguf --lora-scaled adapter.gguf:0
    {"prompt": "...", "lora": [{"id": 0, "scale": 0.5}]}

llama.cpp multiplies what a request asks for by alpha / rank, which is the scale that the file was written for. Its
graph of Llama rotates neighbouring coordinates where transformers rotates halves, so rows of query and key projections
stand in another order there, and the rows of B with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from dso.errors import UserError
from dso.exports.lora import LoraPlan
from dso.exports.peft import check_scale, lora_card, require_new
from dso.files import replace_folder, write_text

FILE = "adapter.gguf"
# Model type in transformers -> architecture in llama.cpp, where a layer there is a layer here but for its rows' order.
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3",
}  # fmt: skip
ROTATED = ("llama",)  # architectures whose query and key rows are reordered


def write_gguf_lora(plan: LoraPlan, model: Any, folder: str | Path, scale: float = 1.0) -> None:
    """Write ``adapter.gguf`` and a README into a folder.

    Args:
        plan: without offsets.
        model: the plan's, for its config.
        scale: what the file does at a request's scale of 1.

    Raises:
        UserError: if the model's architecture is not one of :data:`ARCHITECTURES`, the scale cannot be exported, or the
            folder holds something already.
    """
    import gguf  # half a second

    check_scale(plan.steering, scale)
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"{config.model_type!r} models are not known to --to gguf-lora, which knows {', '.join(ARCHITECTURES)}; "
            "llama.cpp's convert_lora_to_gguf.py makes a file of what --to lora writes"
        )
    if plan.offsets:
        raise UserError("llama.cpp's adapters hold no offsets; make the plan without them")
    if "lm_head" in plan.layers and config.tie_word_embeddings:
        raise UserError("llama.cpp has no layer of its own for a head that is tied to the embedding")
    name = ARCHITECTURES[config.model_type]
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    with replace_folder(require_new(folder)) as fresh:
        writer = gguf.GGUFWriter(fresh / FILE, name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scale * plan.rank)
        for module, layer in plan.layers.items():
            place = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
            if place is None:
                raise UserError(f"llama.cpp has no name for {module}, which the steering changes")
            b = _rotated(module, layer.b, config) if name in ROTATED else layer.b
            writer.add_tensor(f"{place}.lora_a", layer.a.contiguous().numpy())
            writer.add_tensor(f"{place}.lora_b", b.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_text(fresh / "README.md", lora_card(plan, scale))


def _rotated(module: str, rows: Tensor, config: Any) -> Tensor:
    """Rows of a query or key projection in llama.cpp's order, (d_out, rank); those of other layers as they are."""
    end = module.rpartition(".")[2]
    if end not in ("q_proj", "k_proj"):
        return rows
    heads = config.num_attention_heads if end == "q_proj" else config.num_key_value_heads
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
