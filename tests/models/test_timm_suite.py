"""timm's own tests/test_models.py, unchanged, on our networks.

    ACMIX_TIMM_TESTS=TIMM/tests/test_models.py pytest -m slow tests/models/test_timm_suite.py

TIMM is timm's source of the installed version. ACMIX_TIMM_ONLY chooses networks, as pytest's -k does ("acmix_san").
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = os.environ.get("ACMIX_TIMM_TESTS", "")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not SUITE, reason="needs timm's tests/test_models.py, named by ACMIX_TIMM_TESTS")
def test_the_networks_pass_timms_own_tests() -> None:
    chosen = f"({os.environ.get('ACMIX_TIMM_ONLY', 'acmix')}) and acmix and not torchscript"
    # the plugin comes first, so that timm's lists hold our names; the folder of timm's source is not on the path
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "acmix.models",
        "-p",
        "no:cacheprovider",
        "-q",
        "-k",
        chosen,
        SUITE,
    ]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stdout[-5000:]
