"""The one error that users cause and can cure."""


class UsageError(Exception):
    """Bad input, said in one line that names the flag and the cure; a command ends on it with exit status 2."""
