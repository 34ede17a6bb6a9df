"""``dso generate``: generate text with a steered model."""

from __future__ import annotations

import argparse

from dso.errors import UserError
from launch.commands.common import load_backbone, open_steering, quieten


def run(arguments: argparse.Namespace) -> int:
    """``dso generate``."""
    quieten()
    steering = open_steering(arguments.steering)
    backbone = load_backbone(arguments, steering)
    if not arguments.prompt.strip():
        raise UserError("the prompt is empty")
    if arguments.chat and not backbone.tokenizer.chat_template:
        raise UserError(f"the tokenizer of {backbone.name!r} has no chat template; leave --chat away")
    prompt = [{"role": "user", "content": arguments.prompt}] if arguments.chat else arguments.prompt
    with steering.on(backbone.model, arguments.scale):
        print(backbone.generate(prompt, max_new_tokens=arguments.max_new_tokens))
    return 0
