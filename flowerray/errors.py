"""Errors of flowerray: nothing else that it raises on purpose reaches a caller."""


class FlowerrayError(Exception):
    """The base of them all."""


class UserError(FlowerrayError):
    """A mistake that the user can mend: one sentence that says what is wrong, where, and what to
    do. Arguments stand in it between backquotes, dotted (`train.epochs`); the command line shows
    them as its flags.
    """
