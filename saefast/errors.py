"""The one error saefast raises for what a caller can put right."""


class InputError(ValueError):
    """Bad input: one line naming the argument, what was seen, what was expected and what to do.

    A ValueError, so callers need not know this class; the command line prints its text and exits with code 2.
    """
