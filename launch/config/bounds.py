"""What values of a config may be: checks that sections share. Each names the field and says the bound; None is passed.

Raises, all of them: ConfigError.
"""

from __future__ import annotations

from collections.abc import Sequence

from launch.config.reading import require


def at_least(low: float, **values: float | None) -> None:
    """Numbers from ``low`` on."""
    for name, value in values.items():
        require(value is None or value >= low, name, f"must be at least {low}, found {value}")


def positive(**values: float | None) -> None:
    """Numbers above 0."""
    for name, value in values.items():
        require(value is None or value > 0, name, f"must be above 0, found {value}")


def within(low: float, high: float, **values: float | None) -> None:
    """Numbers from ``low`` to ``high``, both included."""
    for name, value in values.items():
        require(value is None or low <= value <= high, name, f"must be within {low} and {high}, found {value}")


def share(**values: float | None) -> None:
    """Numbers from 0 to 1."""
    within(0, 1, **values)


def below_one(why: str = "", **values: float) -> None:
    """Numbers from 0 on that are less than 1."""
    for name, value in values.items():
        require(0 <= value < 1, name, f"must be within 0 and below 1{why}, found {value}")


def filled(**values: Sequence | None) -> None:
    """Texts and lists with something in them."""
    for name, value in values.items():
        require(value is None or len(value) > 0, name, "must not be empty")


def different(**values: Sequence | None) -> None:
    """Lists without a value twice."""
    for name, value in values.items():
        require(value is None or len(set(value)) == len(value), name, f"has a value twice: {list(value or ())}")


def rising(**values: Sequence[float]) -> None:
    """One number or more from 0 on, each above the one before."""
    filled(**values)
    for name, numbers in values.items():
        at_least(0, **{f"{name}[{place}]": number for place, number in enumerate(numbers)})
        rise = all(low < high for low, high in zip(numbers, numbers[1:], strict=False))
        require(rise, name, f"must rise, found {list(numbers)}")


def of_adam(betas: Sequence[float]) -> None:
    """Adam's two decay rates."""
    require(len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "betas", "must be two numbers in [0, 1)")


def one_price(kl_budget: float | None, kl_coefficient: float | None) -> None:
    """A price of KL that is fixed, or one that a budget sets."""
    reason = "contradicts kl_budget, which sets the coefficient itself; for a fixed one add kl_budget: null"
    require(kl_budget is None or kl_coefficient is None, "kl_coefficient", reason)


def place_of_run(folder: str, name: str | None) -> None:
    """Where a run is kept: a folder, and a name in it."""
    filled(folder=folder, name=name)
    plain = name is None or (name not in (".", "..") and not {*name} & {*"/\\\0"})
    require(plain, "name", f"must be a name, not a path, found {name!r}; the place is run.folder")
