"""The networks; importing this package registers every one of them with timm."""

from acmix.errors import needs_train_extra

with needs_train_extra():
    from timm.models import register_notrace_module

    from acmix.layers import ACmix
    from acmix.models import acmix_pvt, acmix_resnet, acmix_san, acmix_swin
    from acmix.models.factory import create_model
    from acmix.models.official import load_official

    register_notrace_module(ACmix)  # one node in the graphs that timm makes of a network

__all__ = ["acmix_pvt", "acmix_resnet", "acmix_san", "acmix_swin", "create_model", "load_official"]
