"""What a user can mend: said in one sentence, without a traceback."""


class UsageError(ValueError):
    """Wrong settings or files. The message names what was wrong, what came and what is accepted."""
