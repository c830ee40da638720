"""Whether huggingface.co answers: asked first, as libraries try again for minutes."""

from __future__ import annotations

_SECONDS = 5


def hub_answers() -> bool:
    """Return whether huggingface.co, or the mirror in `HF_ENDPOINT`, answers within 5 seconds."""
    try:
        from huggingface_hub import constants, get_session

        if constants.HF_HUB_OFFLINE:
            return False
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # of the network: there are dozens of kinds, and none matters here
        return False
    return True
