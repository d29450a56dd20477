"""The one error saefast raises for what a caller can put right."""

# A path may have thousands of characters, and a value millions.
_LONGEST = 700


class InputError(ValueError):
    """Bad input: one line naming the argument, what was seen, what was expected and what to do.

    A ValueError, so callers need not know this class; the command line prints its text and exits with code 2. Line
    breaks, which a path may hold, are written as \\n, and the middle of a very long text is left out.
    """

    # Here and not where it is made: torch.compile traces how an error is made, if its class leaves that to Python.
    def __str__(self) -> str:
        line = "\\n".join(super().__str__().splitlines())
        half = _LONGEST // 2
        return line if len(line) <= _LONGEST else f"{line[:half]} [...] {line[-half:]}"
