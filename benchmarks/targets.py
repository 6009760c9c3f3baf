"""The project's speed and memory targets: the rows of the table, each with what it is compared with."""

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.comparisons import (
    attention_floor,
    batch_per_gib,
    block,
    block_memory,
    compiled_block,
    compiled_network,
    compiled_over_eager,
    network,
    scaling,
    throughput,
)
from benchmarks.loaders import LOADER_TARGETS
from benchmarks.runs import first_step, probes_cost, quickstart_accuracy, quickstart_seconds, trainer
from benchmarks.suite import Target
from benchmarks.tried import with_what_was_tried

_SHAPES = {"64x56": 30, "128x28": 25, "256x14": 16, "512x7": 7}  # of the blocks of a ResNet; least gain on the authors'
_RATE = "{} training images/s / {}, 224², bf16, channels_last, batch 128"
_MODES = {"train": "training", "infer": "inference"}
_CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "cifar10"
_NARROW = (str(_CONFIGS / "narrow_acmix_resnet26.yaml"), str(_CONFIGS / "narrow_resnet26.yaml"))
_RESNETS = ("acmix_resnet26", "resnet26")
_SWINS = ("acmix_swin_tiny", "swin_tiny_patch4_window7_224")


def _networks() -> list[Target]:
    """ACmix networks against what they replace."""

    def row(
        key: str, what: str, limit: float, pair: tuple[str, str], mode: str, *, channels_last: bool = False, **how: Any
    ) -> Target:
        measured = partial(network, ours=pair[0], plain=pair[1], mode=mode, channels_last=channels_last, **how)
        layout = ", channels_last" if channels_last else ""
        key = f"{key}_{mode}{'_channels_last' if channels_last else ''}"
        return Target(key, f"time of {what}, {_MODES[mode]}{layout}", "cpu", limit, False, measured)

    resnet26, swin = "ACmix-ResNet-26 / resnet26", "ACmix-Swin-T / timm's Swin-T"
    resnet50, narrow = "ACmix-ResNet-50 / resnet50", "narrow ACmix-ResNet-26 / its plain twin, 32², batch 64"
    return [
        row("resnet26", resnet26, 1.10, _RESNETS, "train", theirs="authors:resnet26"),
        row("resnet26", resnet26, 1.10, _RESNETS, "train", channels_last=True),
        *(row("resnet26", resnet26, 1.15, _RESNETS, "infer", channels_last=last) for last in (False, True)),
        *(
            row("resnet50", resnet50, 1.15, ("acmix_resnet50", "resnet50"), "infer", channels_last=last)
            for last in (False, True)
        ),
        row("swin_tiny", swin, 1.10, _SWINS, "train", theirs="authors:swin_tiny"),
        row("swin_tiny", swin, 1.10, _SWINS, "infer"),
        *(
            row("narrow", narrow, 1.3, _NARROW, "train", channels_last=last, image_size=32, batch_size=64)
            for last in (False, True)
        ),
    ]


def _compiled() -> list[Target]:
    rows = [
        Target(
            "resnet26_compiled",
            "time of ACmix-ResNet-26 / resnet26, training, both compiled",
            "cpu",
            1.10,
            False,
            partial(compiled_network, ours="acmix_resnet26", plain="resnet26"),
        )
    ]
    for name, title in (("resnet26", "ACmix-ResNet-26"), ("swin_tiny", "ACmix-Swin-T")):
        for mode, doing in _MODES.items():
            measured = partial(compiled_over_eager, name=f"acmix_{name}", mode=mode)
            what = f"time of {title} compiled / eager, {doing}"
            rows.append(Target(f"{name}_compiled_over_eager_{mode}", what, "cpu", 1.0, False, measured))
    return rows


def _parts() -> list[Target]:
    """Operations and blocks, forward and backward, batch 4: over threads and against the authors'."""
    rows = []
    for part in ("attention", "shift_conv", "block"):
        for shape in _SHAPES:
            measured = partial(scaling, subject=f"{part}:{shape}")
            what = f"{part} {shape}, time on 1 thread / on 2, the layout that gains less"
            rows.append(Target(f"{part}_{shape}_scaling", what, "cpu", 1.7, True, measured, threads=(2,)))
    for shape, limit in _SHAPES.items():
        what = f"time of the authors' block {shape} / ours"
        rows.append(Target(f"block_{shape}", what, "cpu", limit, True, partial(block, shape=shape)))
    compiled, memory = partial(compiled_block, shape="64x56"), partial(block_memory, shape="64x56")
    what = "time of the authors' block 64x56 / ours compiled"
    rows.append(Target("block_64x56_compiled", what, "cpu", 20, True, compiled, threads=(1,)))
    what = "peak memory of the authors' block 64x56 / ours, batch 8"
    rows.append(Target("block_64x56_memory", what, "cpu", 7, True, memory, threads=(1,)))
    return rows


def _runs() -> list[Target]:
    return [
        Target("trainer", "images/s of the trainer / of a bare loop", "cpu", 0.98, True, trainer),
        Target("quickstart", "quickstart, wall seconds", "cpu", 75, False, quickstart_seconds, threads=(2,)),
        Target("quickstart_top1", "quickstart, top-1 in percent", "cpu", 97, True, quickstart_accuracy, threads=(2,)),
        Target("first_step", "seconds to the first step, warm", "cpu", 6, False, first_step, threads=(2,)),
        Target(
            "probes", "percent of training that the default probes take", "cpu", 2, False, probes_cost, threads=(1,)
        ),
    ]


def _gpu() -> list[Target]:
    floor = "local attention 64x56 forward + backward, bf16, batch 128: time / memory floor"
    batch = "ACmix-ResNet-50 images per GiB at 224², bf16: ours / the reference operation's"
    resnets = partial(throughput, ours="acmix_resnet50", plain="torchvision:resnet50")
    swins = partial(throughput, ours=_SWINS[0], plain=_SWINS[1])
    resnet_rate = _RATE.format("ACmix-ResNet-50", "torchvision ResNet-50")
    swin_rate = _RATE.format("ACmix-Swin-T", "timm Swin-T")
    shape, name = partial(attention_floor, shape="64x56"), partial(batch_per_gib, name="acmix_resnet50")
    return [
        Target("resnet50", resnet_rate, "cuda", 0.6, True, resnets, threads=(1,)),
        Target("attention_floor", floor, "cuda", 4, False, shape, threads=(1,)),
        Target("swin_tiny_rate", swin_rate, "cuda", 0.95, True, swins, threads=(1,)),
        Target("resnet50_batch", batch, "cuda", 8, True, name, threads=(1,)),
    ]


TARGETS = with_what_was_tried([*_networks(), *_compiled(), *_parts(), *_runs(), *LOADER_TARGETS, *_gpu()])
