"""The probe path_balance on networks whose blocks differ."""

import timm

from acmix import models  # noqa: F401 - registers the networks
from acmix.telemetry.probes.balance import path_balance

SMALL = {"num_classes": 5, "embed_dims": (8, 8, 16, 16), "heads": (1, 1, 2, 2), "img_size": 32, "patch_size": 2}


def test_a_block_of_one_path_among_others_of_two_has_a_row_without_a_ratio() -> None:
    rows = path_balance(timm.create_model("acmix_pvt_tiny", **SMALL), {})
    assert [row["log_ratio"] for row in rows] == [*[0.0] * 7, None]
    assert [row["shift_distance"] is None for row in rows] == [*[False] * 7, True]
