"""How fast and how lean: cases timed in turn after a parity check, against others and against targets."""

import os

# Read when torch is first imported: the profiler that counts memory announces every start and stop on stderr otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
