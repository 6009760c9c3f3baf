"""The two steps of patchwise attention over a k × k patch: public operations and their implementations."""

from acmix.ops.patchwise.op import patch_aggregation, patch_features

__all__ = ["patch_aggregation", "patch_features"]
