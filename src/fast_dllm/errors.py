"""The one exception for what a user can put right."""


class FastDLLMError(Exception):
    """Bad input: one line that names the thing, the place and the remedy.

    The command line prints it and exits with code 2.
    """
