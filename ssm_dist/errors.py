"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake in the input (configuration, checkpoint, prompt), with a message that says what to do.

    Raised on every rank alike; the command line prints it once, from one rank, without a traceback.
    """
