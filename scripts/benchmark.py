"""Time networks, blocks and operations against each other, in one process and in turn, after a parity check.

    python scripts/benchmark.py acmix_resnet26 --against resnet26
    python scripts/benchmark.py block:64x56 --impl all --authors CLONE --against authors:block:64x56
    python scripts/benchmark.py --data CONFIG [KEY.PATH=VALUE ...] [--against timm]
    python scripts/benchmark.py --suite --authors CLONE --photos FOLDER --cifar FOLDER
    python scripts/benchmark.py --suite --only 'resnet26*,trainer' --threads 2

A subject is a timm model (ours or another), the model of a config (FILE.yaml), torchvision:NAME, authors:NAME
(resnet26, swin_tiny, ...), or a part of a network, CHANNELSxSIZE with sSTRIDE where it strides: block:64x56,
block:128x28s2, authors:block:64x56, attention:64x56, shift_conv:64x56, shift_conv:64x56:full. --data times the
loader of a run alone, its model alone, and both. CLONE is a clone of github.com/LeapLabTHU/ACmix, FOLDER holds
photographs in class folders.

The suite measures every target of the device: speed on 1 and 2 CPU threads, in both layouts, training and inference;
memory; whole runs. After each row it writes benchmarks/results-DEVICE.json, a file for each processor and instruction
set or GPU, and benchmarks/RESULTS.md, made from all such files there. With --only it measures some rows again; the
others stay, each with the revision and date that it was measured at.
Exit status: 1 if an implementation differs from the reference and was therefore not timed, 2 for bad usage.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the suite lies beside the package, not in it

from acmix import models  # noqa: E402, F401 - registers our models with timm
from benchmarks import command  # noqa: E402

if __name__ == "__main__":
    sys.exit(command.run(str(__doc__), ROOT / "benchmarks"))
