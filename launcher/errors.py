"""The exception of the top floor, below the root in `shards.errors`."""

from mmscale.errors import RunError


class LaunchError(RunError):
    """A run that was started and did not reach its end.

    Args:
        message: the paragraph for the user.
        exit_code: what the launcher exits with.
    """

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
