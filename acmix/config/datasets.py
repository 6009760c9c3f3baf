"""The table of datasets: what a config has to say for each, and what opens it.

Light on purpose (no torch, no numpy): a builder is named by its import path and imported when the data is opened.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from acmix.errors import UserError

if TYPE_CHECKING:
    from acmix.config.schema import DataConfig

Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)

_STREAMS = ("hfids/", "tfds/")
"""timm's datasets that can only be read from their beginning, in an order of their own; refused."""


@dataclass(frozen=True)
class Dataset:
    """A value of `data.dataset`."""

    name: str
    """The value itself, or a prefix with its slash: "wds/" takes any name after it."""

    build: "str | Callable[[DataConfig, str], Any]"
    """Called with the `data` section and a split, returns an `acmix.data.datasets.Source`; "module:function" or
    the function."""

    aliases: tuple[str, ...] = ()
    """Other names of the same dataset."""

    needs_root: bool = True
    """Whether `data.root` is required."""

    can_download: bool = False
    """Whether `data.download` is allowed."""

    mean: Triple = IMAGENET_MEAN
    """Mean of R, G, B in 0..1 over the training images, unless `data.mean` is set."""

    std: Triple = IMAGENET_STD
    """Their standard deviation, unless `data.std` is set."""


_TABLE: dict[str, Dataset] = {}


def register_dataset(dataset: Dataset) -> None:
    """Make a dataset known under its name and aliases. Raises UserError for a name that is taken."""
    keys = [_key(name) for name in (dataset.name, *dataset.aliases)]
    for key in keys:
        if key in _TABLE or key in _STREAMS:
            raise UserError(f"the dataset name {key!r} is taken; register {dataset.name!r} under another name")
    _TABLE.update(dict.fromkeys(keys, dataset))


def find_dataset(name: str) -> Dataset:
    """The dataset that a value of `data.dataset` names. Raises UserError with the nearest name."""
    key = _key(name)
    if key in _STREAMS:
        raise UserError(
            f"{name!r}: {key} streams cannot be replayed from the middle of an epoch nor counted exactly; "
            "use hfds/ (random access), wds/, tar or folder"
        )
    if key not in _TABLE:
        nearest = get_close_matches(name, _TABLE, n=1, cutoff=0)[0]
        raise UserError(f"unknown dataset {name!r}; nearest: {nearest} (all: {', '.join(_TABLE)})")
    return _TABLE[key]


def _key(name: str) -> str:
    """A name as it stands in the table; of a name with a slash, only the prefix, in lower case."""
    prefix, slash, _ = name.partition("/")
    return prefix.lower() + slash if slash else name


for _dataset in (
    Dataset(
        "digits",
        "acmix.data.arrays:open_digits",
        needs_root=False,
        mean=(0.309, 0.309, 0.309),
        std=(0.349, 0.349, 0.349),
    ),
    Dataset(
        "cifar10",
        "acmix.data.arrays:open_cifar",
        can_download=True,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    Dataset(
        "cifar100",
        "acmix.data.arrays:open_cifar",
        can_download=True,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
    Dataset("folder", "acmix.data.datasets:open_folder", aliases=("imagefolder", "image_folder")),
    Dataset("tar", "acmix.data.datasets:open_tar"),
    Dataset("imagenet", "acmix.data.imagenet:open_imagenet"),
    Dataset("wds/", "acmix.data.datasets:open_shards"),
    Dataset("torch/", "acmix.data.timm_source:open_timm", can_download=True),
    Dataset("hfds/", "acmix.data.timm_source:open_timm", needs_root=False),
):
    register_dataset(_dataset)
