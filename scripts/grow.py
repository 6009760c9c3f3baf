"""Start from what is trained: a plain network's weights in an ACmix network, whose new path grows from nothing.

    python scripts/grow.py --from timm:NAME|RUN|CHECKPOINT|FILE --model NAME --out FILE.safetensors
                           [--calibrate CONFIG] [--images N] [--share S] [--regroup] [--force] [KEY.PATH=VALUE ...]

A Swin, and any network of ours with one path, is taken over exactly. A plain ResNet is approximated: give --calibrate,
a config whose training images the kernels are fitted to; with it the top-1 before any training is measured too.
KEY.PATH=VALUE: model.* of the network to grow, else of CONFIG. The network's arguments are those of CONFIG where it
is for the same model, else those of the run that the weights are from. Start a run by model.checkpoint=FILE; the file
says what is new, for optimizer.new_lr_factor. Exit status: 0 done; 2 refused, with the reason.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from acmix import models
from acmix.checkpoint.atomic import prove_writable, write_atomically
from acmix.checkpoint.grown import METADATA
from acmix.checkpoint.layout import names_something
from acmix.checkpoint.weights import pick_weights
from acmix.config import Config, data_config, load_config
from acmix.data.loader import Data, build_data
from acmix.engine.evaluate import evaluate
from acmix.engine.forward import network_inputs
from acmix.engine.run_folder import config_of_run, trained_classes
from acmix.errors import UserError, one_line
from acmix.layers import ACmix
from acmix.paths import expand_path, missing_path_hint
from acmix.process.distributed import Distributed
from acmix.process.program import Arguments, run_program

PLAIN: dict[str, tuple[object, ...]] = {
    "block": ("plain",), "mix": ("attention", "convolution"), "pretrained": (True, False),
}  # fmt: skip
"""Arguments of a network, with the values that the grown one does not take over."""


IMAGES = 256
"""Training images to fit the kernels to, unless told otherwise."""


class Source(NamedTuple):
    """What to grow from: weights, and where there are, the config and classes of their run, the network of timm."""

    weights: dict[str, Tensor]
    config: Config | None = None
    classes: list[str] | None = None
    network: nn.Module | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Grow a network as the command line says; returns the exit status."""
    return run_program(lambda: grow_from(_parse(arguments)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    shape = argparse.RawDescriptionHelpFormatter
    parser = Arguments(prog="grow.py", description=__doc__, formatter_class=shape)
    add = parser.add_argument
    add("--from", dest="source", required=True, metavar="SOURCE", help="timm:NAME, a run, a checkpoint or a file")
    add("--model", required=True, metavar="NAME", help="network to grow, such as acmix_swin_tiny")
    add("--out", required=True, type=Path, metavar="FILE.safetensors", help="file to write")
    add("--calibrate", metavar="CONFIG", help="config with training images to fit the kernels to, and validation data")
    add("--images", type=int, metavar="N", help="training images to fit them to (256)")
    add("--share", type=float, default=0.0, metavar="S", help="first weight of the new path (0); the other has 1 - S")
    add("--regroup", action="store_true", help="let channels of a convolution that share directions share a group")
    add("--force", action="store_true", help="overwrite the file if it exists")
    add("overrides", nargs="*", metavar="KEY.PATH=VALUE", help="config values to override")
    return parser.parse_intermixed_args(arguments)


def grow_from(options: argparse.Namespace) -> int:
    """Read the weights, grow, write, and measure where there is data; raises UserError."""
    _check(options)
    of_model = [text for text in options.overrides if text.startswith("model.")]
    of_data = [text for text in options.overrides if not text.startswith("model.")]
    if of_data and options.calibrate is None:
        raise UserError(f"{of_data[0]}: only model.* can be given without --calibrate CONFIG")
    asked = data_config(".", [f"model.name={options.model}", *of_model])
    config = None if options.calibrate is None else load_config(options.calibrate, of_data)
    source = _read(options.source)
    with Distributed.start((config or asked).run) as dist:
        data = None if config is None else build_data(_lightly_augmented(config), classes=source.classes)
        classes = asked.model.num_classes or (data.num_classes if data else _classes(options.model, source.weights))
        kwargs, size = _arguments(options.model, config, source.config) | asked.model.kwargs, _size(config, source)
        network = models.create_model(options.model, classes, image_size=size, **kwargs).to(dist.device)
        images = None if config is None or data is None else _images(config, data, dist, options.images or IMAGES)
        with tqdm(total=sum(isinstance(part, ACmix) for part in network.modules()), disable=None, leave=False) as bar:
            growth = models.grow(
                network, source.weights, calibration=images, share=options.share, regroup=options.regroup,
                on_layer=lambda layer: _advance(bar),
            )  # fmt: skip
        if source.network is not None:
            _prove_same(source.network, source.weights, options.model, kwargs)
        new = json.dumps(growth.new)
        content = save(network.state_dict(), metadata={"format": "pt", METADATA: new})
        write_atomically(options.out, content, make_parents=True)
        print("\n".join(growth.lines()))
        if config is not None and data is not None and not any("classifier" in note for note in growth.notes):
            metrics = evaluate(network, data.val, dist, config.precision)
            assert metrics is not None
            print(f"top-1 before any training: {metrics['top1']:.2f} % of {metrics['count']} images")
    print(f"Wrote {options.out}: {options.model}; start a run from it by model.checkpoint={options.out}", flush=True)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse what can be refused before any work."""
    if options.out.suffix != ".safetensors":
        raise UserError(f"--out {options.out}: the name must end in .safetensors")
    if options.out.is_file() and not options.force:
        raise UserError(f"--out {options.out}: exists already; choose another name, or overwrite it with --force")
    if not 0 <= options.share < 1:
        raise UserError(f"--share: must be from 0 to less than 1, got {options.share}")
    if options.images is not None and options.calibrate is None:
        raise UserError("--images: are those of --calibrate CONFIG; give that too, or leave them out")
    if options.images is not None and options.images < 1:
        raise UserError(f"--images: must be at least 1, got {options.images}")
    prove_writable("--out", options.out)


def _read(text: str) -> Source:
    if text.startswith("timm:"):
        network = _timm(text.removeprefix("timm:"))
        return Source(network.state_dict(), network=network)
    path = Path(expand_path(text, "--from"))
    if not names_something(path):
        raise UserError(f"--from {path}: no such run, checkpoint or weights file{missing_path_hint(path)}")
    config = config_of_run(path)
    weights, classes = pick_weights(path)
    return Source(weights, None if config is None else load_config(config), classes or trained_classes(path))


def _timm(name: str) -> nn.Module:
    """timm's network with its pretrained weights."""
    if not timm.is_model(name) or not timm.models.is_model_pretrained(name):
        nearest = get_close_matches(name, timm.list_pretrained(), n=3)
        hint = f"; did you mean {', '.join(nearest)}?" if nearest else ""
        raise UserError(f"--from timm:{name}: timm has no pretrained weights of that name{hint}")
    try:
        return timm.create_model(name, pretrained=True).eval()
    except Exception as error:
        raise UserError(
            f"--from timm:{name}: the weights cannot be loaded: {one_line(error)}. Download them on a machine that is "
            "connected to huggingface.co, and give the file: --from FILE"
        ) from error


def _arguments(name: str, *configs: Config | None) -> dict[str, Any]:
    """The arguments of the network in the first config that is for this model, but those that leave out a path."""
    kwargs = next((config.model.kwargs for config in configs if config and config.model.name == name), {})
    return {key: value for key, value in kwargs.items() if value not in PLAIN.get(key, ())}


def _size(config: Config | None, source: Source) -> tuple[int, int] | None:
    """Height and width of the images that the network is for; None leaves it to the network."""
    described = config or source.config
    return None if described is None else described.data.size


def _classes(name: str, weights: dict[str, Tensor]) -> int:
    """Number of classes of the weights' classifier; 1000 where they have none."""
    classifier = timm.models.get_pretrained_cfg(name)
    head = None if classifier is None else weights.get(f"{classifier.classifier}.weight")
    return 1000 if head is None else len(head)


def _lightly_augmented(config: Config) -> Config:
    """The config with training images cropped and flipped, but with no colours changed and nothing erased."""
    changes = {"auto_augment": None, "color_jitter": 0.0, "erase_prob": 0.0}
    return config.model_copy(update={"augment": config.augment.model_copy(update=changes)})


def _images(config: Config, data: Data, dist: Distributed, count: int) -> list[Tensor]:
    """Training images, in batches, `count` in all or as many as there are."""
    batches: list[Tensor] = []
    for batch in chain.from_iterable(data.train.epoch(0)):
        images, _ = network_inputs(batch, config.precision, dist.device)
        batches.append(images[: count - sum(map(len, batches))].clone())
        if sum(map(len, batches)) >= count:
            break
    return batches


def _advance(bar: Any) -> None:
    bar.update()


@torch.no_grad()
def _prove_same(network: nn.Module, weights: dict[str, Tensor], name: str, kwargs: dict[str, Any]) -> None:
    """UserError where our plain network computes something else from the tensors than the one that they are from."""
    size: tuple[int, int, int] = network.pretrained_cfg["input_size"]  # type: ignore[assignment,index]
    residual = any(key.endswith(".conv2.weight") for key in weights)
    plain = {"block": "plain"} if residual else {"mix": "attention"}
    twin = models.create_model(name, _classes(name, weights), image_size=size[1:], **kwargs | plain)
    if residual:
        twin.load_state_dict(weights)
    else:
        models.grow(twin, weights)
    images = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    wanted, found = network.eval()(images), twin.eval()(images)
    if (wanted - found).abs().max() > 1e-3 * wanted.abs().max():
        raise UserError(f"--from: timm's network has the tensors of {name}, but computes something else from them")


if __name__ == "__main__":
    sys.exit(main())
