"""The error for invalid input."""


class UsageError(Exception):
    """Invalid input, described in one line that names the flag and what to do; commands exit with status 2."""
