"""Run a program of timm's, or any other, with these networks known to timm.

python -m acmix.models PROGRAM.py [ARGUMENTS ...]
torchrun --nproc-per-node N -m acmix.models train.py [ARGUMENTS ...]
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        print(f"{__doc__}\nerror: {' '.join(sys.argv[1:2]) or 'PROGRAM.py'}: no such program", file=sys.stderr)
        sys.exit(2)
    sys.argv.pop(0)
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
