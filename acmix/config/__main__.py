"""Check a config and print it resolved: `python -m acmix.config FILE [KEY.PATH=VALUE ...]`, or `--schema`."""

import sys
from collections.abc import Sequence

from acmix.config import json_schema, load_config
from acmix.errors import UserError
from acmix.process.program import Arguments, run_program


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_program(lambda: show(arguments))


def show(arguments: Sequence[str] | None) -> int:
    """Check a config and print it resolved, or print the JSON schema. Raises UserError."""
    parser = Arguments(prog="python -m acmix.config", description=__doc__)
    parser.add_argument("config", nargs="?", help="YAML file to check and print with every default")
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema instead")
    options = parser.parse_args(arguments)
    if not options.schema and options.config is None:
        raise UserError("give a config file or --schema")
    sys.stdout.write(json_schema() if options.schema else load_config(options.config, options.overrides).dump())
    return 0


if __name__ == "__main__":
    sys.exit(main())
