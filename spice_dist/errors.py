"""What a user can get wrong, told in one line."""


class UserError(Exception):
    """A mistake in the input: what is wrong, where, and how to fix it. The command prints it and exits with 1."""


class Interrupted(Exception):
    """Asked to stop from outside; the state is saved and the same command goes on from it."""


class DamagedFile(UserError):
    """A file of ours that is truncated, altered or was never finished."""
