"""The one exception for a user's mistake."""


class UserError(ValueError):
    """What a user can mend: one line that says what is wrong, the value received and what to do.

    Entry scripts print it without a traceback and end with exit code 2.
    """
