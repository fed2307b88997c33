"""The one exception that stands for a user's mistake, and what its messages propose."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input (configuration, checkpoint, prompt), with a message that says what to do.

    Raised on every rank alike; the command line prints it once, from one rank, without a traceback.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Of some known names, of which there is at least one, that which is most like `name`."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
