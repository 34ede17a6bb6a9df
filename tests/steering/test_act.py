"""Maps of Linear-AcT as a steering."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama

from dso.steering.act import from_linear_act
from dso.steering.config import SteeringError

SITE = "model.layers.1.input_layernorm"


@torch.no_grad()
def test_a_scale_is_the_strength_of_the_transport() -> None:
    """(1 - s) h + s (w h + b), written out at the module itself."""
    model = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    w, b = 1 + torch.randn(16, generator=generator), torch.randn(16, generator=generator)
    steering = from_linear_act(model, {SITE: (w, b)}, groups=("female", "male"))
    assert (steering.config.operator, steering.config.sites) == ("affine", {SITE: 16})
    x = torch.randn(3, 16, generator=generator)
    norm = model.get_submodule(SITE)
    h = norm(x)
    for strength in (0.25, 1.0):
        with steering.on(model, strength):
            torch.testing.assert_close(norm(x), (1 - strength) * h + strength * (w * h + b))


@pytest.mark.parametrize(
    ("site", "w", "b", "message"),
    [
        ("model.nothing", torch.ones(16), torch.ones(16), "no module 'model.nothing'"),
        (SITE, torch.ones(8), torch.ones(16), r"shapes \(8,\) and \(16,\), expected \(16,\) twice"),
        (SITE, torch.ones(16), torch.full((16,), torch.nan), "is not finite"),
    ],
)
def test_maps_that_do_not_fit_are_refused(site: str, w: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        from_linear_act(tiny_llama(), {site: (w, b)})
