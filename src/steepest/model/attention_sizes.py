"""What attention modules and configs call their numbers of heads and the sizes of these."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")
HEAD_SIZE = ("head_dim", "head_size", "d_head", "d_kv")
WIDTH = ("hidden_size", "n_embd", "embed_dim", "d_model", "width")
OF_HEADS = re.compile(r"head|d_kv", re.IGNORECASE)
"""In the name of any number that says how many heads there are, or of which size."""


def first_size(names: tuple[str, ...], *sources: Any) -> int | None:
    """Return the first of these attributes that is a positive integer; the sources come in turn.

    >>> from types import SimpleNamespace
    >>> first_size(HEADS, None, SimpleNamespace(n_head=4, num_heads=0))
    4
    """
    for source in sources:
        with suppress(Exception):  # some configs refuse to say what differs between their layers
            values = (getattr(source, name, None) for name in names)
            return next(v for v in values if isinstance(v, int) and v > 0)
    return None
