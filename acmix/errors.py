"""The one exception a person is meant to read: bad usage, bad config, bad data, bad files."""


class UserError(Exception):
    """Something the user can put right.

    The message names the file, key or path and says what to do; the command-line programs print it
    on stderr without a traceback and exit with status 2.
    """
