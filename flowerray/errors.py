"""The one kind of error that a user sees as a sentence instead of a traceback."""


class UserError(ValueError):
    """A mistake that the user can mend. The message says what is wrong, where, and what to do, in
    one sentence.
    """
