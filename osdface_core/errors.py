"""The error that users are meant to read."""

from __future__ import annotations


class OSDFaceError(ValueError):
    """Bad input, in one sentence: what was given, what is wanted, what to do.

    Hosts show the message as it is.
    """
