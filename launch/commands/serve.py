"""``dso serve``: an endpoint that speaks OpenAI's protocol, with the steering's scale in each request."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dso.errors import UserError
from dso.steering.model import Steering
from launch.commands.common import load_backbone, quieten, scale_of


def run(arguments: argparse.Namespace) -> int:
    """``dso serve``."""
    try:
        import prometheus_client  # noqa: F401  (here, so that what is missing is said at once)
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}; serving needs: pip install 'dso[serve]'") from error
    from dso.serve.app import bind, make_app, run
    from dso.serve.asking import Limits
    from dso.serve.engine import Engine

    quieten()
    socket = bind(arguments.host, arguments.port)
    steering = Steering.from_pretrained(arguments.steering)
    backbone = load_backbone(arguments, steering)
    handle = steering.to(backbone.device).attach(backbone.model, scale := scale_of(arguments.scale, steering))
    engine = Engine(backbone, handle, max_rows=arguments.max_rows, max_queue=arguments.max_queue)
    most = min(arguments.max_tokens, backbone.context or arguments.max_tokens)
    limits = Limits(scale=scale, scales=steering.config.scale_range, max_tokens=most, model=Path(backbone.name).name)
    key = os.environ.get("DSO_API_KEY") or None
    app = make_app(engine, limits, key=key, max_body=arguments.max_body)
    host, port = socket.getsockname()[:2]
    line = f"serving {limits.model} at scales {limits.scales[0]:g} to {limits.scales[1]:g}: http://{host}:{port}"
    run(app, socket, lambda: print(line, flush=True))
    return 0
