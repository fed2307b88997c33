"""What ends a job with one message: a user's mistake, and ranks that do not answer."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input (configuration, checkpoint, prompt), with a message that says what to do.

    Raised on every rank alike; the command line prints it once, from one rank, without a traceback.
    """


class RankFailure(RuntimeError):
    """A reduction that could not end; the message names the op, and the ranks that were missing."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Of some known names, of which there is at least one, that which is most like `name`."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
