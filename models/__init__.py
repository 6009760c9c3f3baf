"""The networks; importing this package registers every one of them with timm."""

from models import acmix_resnet, acmix_swin
from models.factory import create_model
from models.official import load_official

__all__ = ["acmix_resnet", "acmix_swin", "create_model", "load_official"]
