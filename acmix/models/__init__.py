"""The networks; importing this package registers every one of them with timm."""

from acmix.errors import needs_train_extra

with needs_train_extra():
    from acmix.models import acmix_resnet, acmix_swin
    from acmix.models.factory import create_model
    from acmix.models.growth import grow
    from acmix.models.official import load_official

__all__ = ["acmix_resnet", "acmix_swin", "create_model", "grow", "load_official"]
