"""Convert weights released by the authors (github.com/LeapLabTHU/ACmix) into a file for our networks.

    python scripts/convert_official.py IN.pth OUT.safetensors --model acmix_resnet26 [--force]

The result loads with plain timm: timm.create_model(NAME).load_state_dict(safetensors.torch.load_file(OUT)).
Every tensor of IN must be used or known to have no effect; nothing in IN is executed. Exit status: 0 done, 2 refused.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save

from acmix import models
from acmix.checkpoint.atomic import prove_writable, write_atomically
from acmix.checkpoint.untrusted import load_state_dict_file
from acmix.errors import UserError
from acmix.process.program import Arguments, run_program

CLASSIFIERS = ("fc.weight", "head.weight")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_program(lambda: convert(arguments))


def convert(arguments: Sequence[str] | None) -> int:
    """Read, convert, write. Raises UserError for bad usage, bad weights or a file that cannot be written."""
    parser = Arguments(
        prog="convert_official.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="IN.pth", help="weights file of the authors' code")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors", help="file to write")
    parser.add_argument("--model", required=True, metavar="NAME", help="network of ours, such as acmix_swin_tiny")
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it exists")
    options = parser.parse_args(arguments)
    check_output(options.out, force=options.force)
    weights = load_state_dict_file(options.source)
    # the ImageNet stem's convolution and the blocks' mixing layers are 4-dimensional: only a classifier is a matrix
    classes = next((len(weights[name]) for name in CLASSIFIERS if name in weights and weights[name].dim() == 2), 1000)
    model = models.create_model(options.model, num_classes=classes)
    try:
        models.load_official(model, weights)
    except ValueError as error:
        raise UserError(f"{options.source}: {error}") from error
    write_atomically(options.out, save(model.state_dict(), metadata={"format": "pt"}), make_parents=True)
    print(f"Wrote {options.out}: {options.model}, {sum(p.numel() for p in model.parameters()):,} parameters")
    return 0


def check_output(out: Path, *, force: bool) -> None:
    """Refuse, before any work, an output that could not or should not be written; raises UserError."""
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: the name must end in .safetensors")
    if out.is_file() and not force:
        raise UserError(f"{out}: exists already; choose another name, or overwrite it with --force")
    prove_writable("OUT", out)


if __name__ == "__main__":
    sys.exit(main())
