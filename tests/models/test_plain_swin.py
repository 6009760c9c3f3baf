"""The plain twin of ACmix-Swin: Swin itself."""

import timm
import torch

from acmix import models


def test_the_attention_alone_is_timms_swin_weight_for_weight() -> None:
    torch.manual_seed(0)
    small = {"embed_dim": 24, "depths": (2, 1, 1, 1), "num_classes": 5}
    theirs = timm.create_model("swin_tiny_patch4_window7_224", **small).double().eval()
    ours = models.create_model("acmix_swin_tiny", mix="attention", **small).double().eval()
    ours.load_state_dict(
        {
            name.replace(".attn.qkv.", ".acmix.qkv.").replace(".attn.", ".acmix.attention."): value
            for name, value in theirs.state_dict().items()
        }
    )
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
