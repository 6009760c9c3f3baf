"""The one exception a person is meant to read: bad usage, bad config, bad data, bad files, a missing package."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can put right.

    The message names the file, key or path and says what to do; the command-line programs print it
    on stderr without a traceback and exit with status 2.
    """


def one_line(error: BaseException, limit: int = 300) -> str:
    """What an exception says, in one line of at most `limit` characters; its type where it says nothing."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


class MissingPackageError(UserError, ImportError):
    """A package of the extra `acmix[train]` is not installed."""


@contextmanager
def needs_train_extra() -> Iterator[None]:
    """Around imports: if a package of others is not installed, raises MissingPackageError with the command to run."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "acmix":
            raise
        raise MissingPackageError(
            f"{package} is not installed; the backbones and the training framework need "
            'pip install "acmix[train]" (in a checkout: pip install -e ".[train]")',
            name=package,
        ) from None
