"""What a user can get wrong, told in one line."""


class UserError(Exception):
    """A mistake in the input: what is wrong, where, and how to fix it. The command prints it and exits with 1."""


class Interrupted(Exception):
    """Asked to stop from outside; the state is saved and the same command goes on from it."""


class DamagedFile(UserError):
    """A file of ours that is truncated, altered or was never finished."""


def out_of_memory(stage: str, error: Exception) -> UserError:
    """What a user is told of a GPU whose memory did not suffice."""
    reason = str(error).splitlines()[0] if str(error) else "out of memory"
    return UserError(f"{stage} needs more memory than the GPU has ({reason}); set a smaller batch or image size")
