"""A command line whose mistakes are reported like every other: one message, no traceback, status 2."""

import argparse
from typing import NoReturn

from acmix.errors import UserError


class Arguments(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of printing its usage and ending the process."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError with the mistake and the way to the help."""
        raise UserError(f"{message}; see {self.prog} --help")
