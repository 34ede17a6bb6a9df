"""What may happen to a file: an accident, or a writer who means harm."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any


def edited(data: bytes, drawn: random.Random) -> bytes:
    """One accident: a file cut off, a bit flipped, or a stretch replaced, taken out, doubled or blanked."""
    at, changed = drawn.randrange(len(data)), bytearray(data)
    kind = drawn.choice(["cut", "flip", "replace", "remove", "double", "blank", "length"])
    length = drawn.randrange(1, 40)
    if kind == "cut":
        return data[:at]
    if kind == "flip":
        changed[at] ^= 1 << drawn.randrange(8)
    elif kind == "replace":
        changed[at : at + length] = drawn.randbytes(drawn.randrange(40))
    elif kind == "remove":
        del changed[at : at + length]
    elif kind == "double":
        changed[at:at] = changed[at : at + length]
    elif kind == "blank":
        changed[at : at + length] = bytes(length)
    else:  # the first eight bytes of the tensors' file: how long its header is
        changed[:8] = drawn.choice([2**63, 2**40, 2**31, len(data), 0, drawn.getrandbits(64)]).to_bytes(8, "little")
    return bytes(changed)


def sign(config: Path, tensors: Path, **changes: Any) -> None:
    """Let the digests of a record fit what is there: no accident, but a writer who means harm."""
    record = json.loads(config.read_text("utf-8"))
    del record["config_sha256"]
    record |= {"tensors_sha256": hashlib.sha256(tensors.read_bytes()).hexdigest()} | changes
    digest = hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    text = json.dumps(record | {"config_sha256": digest}, indent=2, ensure_ascii=False) + "\n"
    config.write_text(text, "utf-8")
