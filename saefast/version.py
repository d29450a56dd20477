"""The version of saefast, in a file that can be imported without the rest."""

__version__ = "0.1.0"
