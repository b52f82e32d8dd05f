"""Damaged files, made from good ones by a seed: bytes flipped, cut, doubled or moved; values of a document replaced."""

from __future__ import annotations

import copy
import random
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, -(2**63) - 1, 0.5, -0.0, float("nan"), float("inf"), 1e308, "", "0", "nan",
    "\x1b[2J\x1b]0;owned\x07", "\u202egnp.exe", "${oc.env:HOME}", "../../etc/passwd", "/dev/zero", "a" * 70_000, [], [[]], {},
    {"": None}, ["x"] * 300, {"a": {"b": {"c": []}}}, "<script>alert(1)</script>", "日本", "\ud800",
)  # fmt: skip
"""Values that some field of some file will not like."""


def damaged_bytes(data: bytes, seed: int) -> bytes:
    """Return bytes that differ from `data` in one to four places, or in length."""
    rng = random.Random(seed)
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        kind, place = rng.randrange(7), rng.randrange(max(1, len(changed)))
        length = rng.randint(1, max(1, len(changed) // 8))
        if kind == 0 and changed:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[place : place + length] = rng.randbytes(length)
        elif kind == 2:
            del changed[place:]
        elif kind == 3:
            del changed[place : place + length]
        elif kind == 4:
            changed[place:place] = changed[place : place + length]
        elif kind == 5:  # a number that says how much follows
            changed[place : place + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\x01"))
        else:
            changed[place:place] = rng.choice((b"\0" * 64, b"\xff\xd9", b"IEND", b"PK\x05\x06", b"\x80\x04."))
    return bytes(changed)


def changed_document(document: Any, seed: int) -> Any:
    """Return a document with one to three of its values or keys replaced, removed or nested."""
    rng = random.Random(seed)
    root = [copy.deepcopy(document)]
    for _ in range(rng.randint(1, 3)):
        place: Any = root
        key: Any = 0
        for _ in range(rng.randint(1, 6)):
            inner = place[key]
            if not isinstance(inner, dict | list) or not inner:
                break
            place, key = inner, rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        kind = rng.randrange(6)
        if kind == 0 and place is not root:
            del place[key]
        elif kind == 1:
            place[key] = [place[key]]
        elif kind == 2:
            place[key] = {"x": place[key]}
        else:
            place[key] = rng.choice(ODD)
    return root[0]
