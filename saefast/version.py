"""The version of saefast, for whoever must say it without importing the rest."""

__version__ = "0.1.0"
