"""A backbone whose weights are divided among the processes from the start, as ZeRO-3 divides them.

transformers makes the model under ``deepspeed.zero.Init``: a tensor is divided as soon as there is one. Then the first
process reads the checkpoint, tensor by tensor from its file, and hands each process its part. So none holds more of the
model at a time than its share and one module's own weights, of the widest: mostly the embeddings.

What is asked of the model before an engine takes it over (how its answers can be laid out, whose weights these are) is
asked by all processes alike, and each module's weights are gathered as a pass comes to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from dso.errors import UserError
from dso.steering.hosts import divided
from trainers.parallel.engine import complete, import_deepspeed
from trainers.parallel.ranks import World

PRECISIONS = {"bfloat16": {"bf16": {"enabled": True}}, "float16": {"fp16": {"enabled": True}}}


@contextmanager
def dividing(settings: dict[str, Any], world: World, dtype: str) -> Iterator[None]:
    """Within the block what transformers loads is divided, and runs divided; for all processes together.

    Args:
        settings: DeepSpeed's configuration, of stage 3.
        dtype: that models are loaded in, by its name.

    Raises:
        UserError: in every process, if one of them cannot load its model.
    """
    deepspeed = import_deepspeed()
    from transformers.integrations import deepspeed as integration

    deepspeed.init_distributed()  # takes over the processes that there are; what follows counts them
    told = integration.HfDeepSpeedConfig(complete(settings, world.size, 1, 0.0, 0) | PRECISIONS.get(dtype, {}))
    verdict: list[UserError | None] = []  # on loading: the first process reads, and may be the only one that cannot

    def agree(error: UserError | None = None) -> None:
        if not verdict:
            try:
                world.require(error)
                verdict.append(None)
            except UserError as found:
                verdict.append(found)
        if verdict[0] is not None:
            raise verdict[0]

    gathered: dict[nn.Module, list[Any]] = {}

    def gather(module: nn.Module, _: Any) -> None:
        if parts := _read_by(module):
            agree()
            world.guard(lambda: parts[0].all_gather(parts))
            gathered[module] = parts

    def divide(module: nn.Module, *_: Any) -> None:
        for parameter in gathered.pop(module, ()):
            parameter.partition()

    hooks = [register_module_forward_pre_hook(gather), register_module_forward_hook(divide, always_call=True)]
    try:
        with world.groups_in_time():
            yield
    except UserError as error:
        agree(error)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        integration.unset_hf_deepspeed_config()
        del told  # transformers found it as long as it was there


def _read_by(module: nn.Module) -> list[Any]:
    """The divided weights that a module's pass reads and that are not whole: its own.

    One with weights of its own may read those of the layers in it too, without calling them (Mamba's mixer does).
    """
    own: list[Any] = list(module.parameters(recurse=False))
    if own:
        layers = (layer for layer in module.children() if not any(layer.children()))
        own += [parameter for layer in layers for parameter in layer.parameters()]
    return divided(own)
