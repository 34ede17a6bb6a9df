"""The layout that a run will have, found without its weights: on a small model of the same architecture.

What decides it is the architecture's code, not its weights: the twin has two layers, few words, a narrow feed-forward
part, random weights in float32, and is asked what the model is asked when it is loaded (:mod:`dso.models.layout`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from dso.errors import UserError
from dso.models.layout import REFUSALS, find_layout, row_limit
from dso.models.scoring import Layout

SMALL = {"num_hidden_layers": 2, "vocab_size": 512, "intermediate_size": 64, "moe_intermediate_size": 64}
MOST = 500_000_000  # weights of a twin
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")  # which have to be within the vocabulary


def expected_layout(config: Any, attention: str | None = None) -> Layout:
    """How a text model's decisions will share a forward pass; packed where no small twin of it can be made.

    Args:
        config: of the model.
        attention: its ``attn_implementation``, where one is asked for.
    """
    from transformers import AutoModelForCausalLM

    small = copy.deepcopy(config)
    for name, value in SMALL.items():
        if hasattr(small, name):
            setattr(small, name, value)
    for name in TOKENS:
        setattr(small, name, None)
    if kinds := getattr(small, "layer_types", None):
        small.layer_types = [*dict.fromkeys(kinds), *kinds][:2]
    state = torch.random.get_rng_state()
    try:
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
        if sum(parameter.numel() for parameter in shape.parameters()) > MOST:
            return "packed"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32, attn_implementation=attention)
        return find_layout(model.eval(), row_limit(small.get_text_config()))[0]
    except (UserError, *REFUSALS):
        return "packed"
    finally:
        torch.random.set_rng_state(state)
