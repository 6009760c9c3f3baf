"""The implementations of the two steps of patchwise attention."""

from acmix.ops.implementations import Implementation, Operation

PATCH_FEATURES = Operation(
    "patch_features",
    Implementation("taps", "acmix.ops.patchwise.features"),
    Implementation("reference"),
)
PATCH_AGGREGATION = Operation(
    "patch_aggregation",
    Implementation("taps", "acmix.ops.patchwise.aggregation"),
    Implementation("reference"),
)
