"""Check a config and print it resolved: `python -m acmix.config FILE [KEY.PATH=VALUE ...]`, or `--schema`."""

import argparse
import sys
from collections.abc import Sequence

from acmix.config import json_schema, load_config
from acmix.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a config and print it resolved, or print the JSON schema; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m acmix.config", description=__doc__)
    parser.add_argument("config", nargs="?", help="YAML file to check and print with every default")
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema instead")
    options = parser.parse_args(arguments)
    if not options.schema and options.config is None:
        parser.error("give a config file or --schema")
    try:
        text = json_schema() if options.schema else load_config(options.config, options.overrides).dump()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
