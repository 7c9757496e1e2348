"""User-facing errors, printed as one sentence without a traceback."""


class UsageError(ValueError):
    """Invalid settings or files. The message says what is invalid, what was given and what is accepted."""
