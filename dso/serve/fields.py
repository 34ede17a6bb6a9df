"""The fields of a request's body, each taken once and checked, and the shape of OpenAI's errors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """An answer that is an error.

    Args:
        message: what is wrong, and what to do.
        status: of HTTP.
        param: the field that is wrong.
        code, kind: what programs tell errors by; OpenAI's words.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def read_body(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body."""
    try:
        body = json.loads(raw, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(f"the body is {shown(body)}, expected a JSON object")
    return body


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def shown(value: object) -> str:
    """A value in a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


class Fields:
    """Takes fields out of a body; null is as good as nothing.

    Args:
        place: where the body stands in the request, such as "candidates.0.".
    """

    def __init__(self, body: Mapping[str, Any], place: str = ""):
        self._left = {name: value for name, value in body.items() if value is not None}
        self._place = place

    def fault(self, name: str, value: object, expected: str) -> ApiError:
        """An error about a field."""
        name = self._place + name
        return ApiError(f"{name} is {shown(value)}, expected {expected}", param=name)

    def take(self, name: str, default: Any = None) -> Any:
        """Whatever the field says."""
        return self._left.pop(name, default)

    def number(self, name: str, low: float, high: float, default: float | None) -> Any:
        """A finite number from ``low`` to ``high``."""
        value = self.take(name, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value) and low <= value <= high):
            raise self.fault(name, value, f"a number from {low:g} to {high:g}")
        return value

    def whole(self, name: str, low: int, high: int, default: int | None) -> Any:
        """A whole number from ``low`` to ``high``."""
        value = self.take(name, default)
        if value is not None and not (type(value) is int and low <= value <= high):
            raise self.fault(name, value, f"a whole number from {low} to {high}")
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise self.fault(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string; one that no tokenizer takes is refused."""
        value = self.take(name, default)
        if not isinstance(value, str):
            raise self.fault(name, value, "a string")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.fault(name, value, "whole characters") from error
        return value

    def neutral(self, values: Mapping[str, tuple[object, ...]]) -> None:
        """Fields that are not implemented, which may say only what changes nothing."""
        for name, allowed in values.items():
            value = self.take(name, allowed[0])
            if not any(value == other and type(value) is type(other) for other in allowed):
                raise ApiError(
                    f"{self._place}{name} is {shown(value)}, but this server does not implement it; leave it out",
                    param=self._place + name,
                    code="unsupported_parameter",
                )

    def end(self) -> None:
        """Refuse what nobody took."""
        for name in self._left:
            raise ApiError(
                f"unrecognized field {self._place}{name}", param=self._place + name, code="unrecognized_parameter"
            )
