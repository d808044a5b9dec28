"""The one error a user sees: what was wrong, where, what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedllmError(Exception):
    """Bad input or an environment that cannot serve it; the command line exits with code 2."""


def nearest(value: object, choices: Iterable[str]) -> str:
    """Say which choices there are, the most similar one first: `` (did you mean 'x'? ...)``."""
    known = sorted(set(choices))
    close = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    listed = ", ".join(known[:40]) + (", ..." if len(known) > 40 else "")
    return f"{hint}valid: {listed}" if known else hint


class Refusal(FedllmError):
    """What a site does not allow; unlike other errors it may be told to the server."""
