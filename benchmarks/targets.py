"""The project's speed and memory targets, each measured beside what it is compared with."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from acmix.ops.native import cxx_compiler
from benchmarks.cases import Case, build_case
from benchmarks.loaders import LOADER_TARGETS
from benchmarks.measure import Result
from benchmarks.parity import ParityError, check_parity
from benchmarks.peak import peak_bytes
from benchmarks.suite import Figure, NotMeasuredError, Suite, Target
from benchmarks.timing import Samples

GIB = 2**30


def run_targets(
    suite: Suite, report: Callable[[str], None], targets: Sequence[Target] | None = None
) -> list[dict[str, Any]]:
    """Measure the rows of the suite's device, each reported as it comes; they are in JSON's types, with `value`,
    `not_measured` or `refused`."""
    rows = []
    for target in TARGETS if targets is None else targets:
        if target.device == suite.device.type:
            rows.append(_run(target, suite))
            report(summary(rows[-1]))
    return rows


def _run(target: Target, suite: Suite) -> dict[str, Any]:
    row: dict[str, Any] = {"key": target.key, "what": target.what, "target": str(target)}
    try:
        figure = target.measure(suite)
    except NotMeasuredError as reason:
        return row | {"not_measured": str(reason)}
    except ParityError as error:
        return row | {"refused": str(error)}
    met = target.met(figure.value.median)
    row |= {"value": figure.value.median, "spread": figure.value.spread, "n": figure.value.n, "met": met}
    return row | {"note": figure.note, "results": [result.as_dict() for result in figure.results]}


def summary(row: dict[str, Any]) -> str:
    """A row in one line of text."""
    if "value" not in row:
        return f"{row['what']}: not measured here: {row.get('not_measured') or row.get('refused')}"
    verdict = "met" if row["met"] else "missed"
    return f"{row['what']}: {row['value']:.2f} ± {row['spread']:.2f} (n={row['n']}), target {row['target']}: {verdict}"


def _time_ratio(numerator: Result, denominator: Result) -> Samples:
    assert numerator.seconds is not None
    assert denominator.seconds is not None
    return numerator.seconds.over(denominator.seconds)


def _block(suite: Suite, shape: str) -> Figure:
    theirs, ours = suite.with_authors(suite.setting, f"authors:block:{shape}", f"block:{shape}")
    results = suite.compare(suite.setting, theirs, ours)
    return Figure(_time_ratio(*results), results)


def _compiled_block(suite: Suite, shape: str) -> Figure:
    _need_compiler()
    theirs, _ = suite.with_authors(suite.setting, f"authors:block:{shape}", f"block:{shape}")
    ours = build_case(f"block:{shape}", replace(suite.setting, compile=True))
    results = suite.compare(suite.setting, theirs, ours)
    return Figure(_time_ratio(*results), results, "the authors' block eager, ours compiled")


def _block_memory(suite: Suite, shape: str) -> Figure:
    setting = replace(suite.setting, batch_size=8)
    theirs, ours = suite.with_authors(setting, f"authors:block:{shape}", f"block:{shape}")
    check_parity(ours)
    peaks = []
    for case in (theirs, ours):
        case.train_step()
        case.clear()
        peaks.append(peak_bytes(case.train_step, suite.device))
    note = f"{peaks[0] / 2**20:.0f} MiB against {peaks[1] / 2**20:.0f} MiB"
    return Figure(Samples((peaks[0] / peaks[1],)), note=note)


def _network(suite: Suite, ours: str, plain: str, theirs: str | None = None) -> Figure:
    """Time of our training step over that of the plain network; the authors' beside them where there is a clone."""
    subjects: list[str | Case] = [ours, plain]
    if theirs is not None and suite.authors is not None:
        subjects += [suite.with_authors(suite.setting, theirs, ours)[0]]
    results = suite.compare(suite.setting, *subjects)
    notes = [f"authors: {_time_ratio(result, results[1]).median:.2f}" for result in results[2:]]
    return Figure(_time_ratio(*results[:2]), results, "; ".join(notes))


def _compiled_network(suite: Suite, ours: str, plain: str) -> Figure:
    _need_compiler()
    setting = replace(suite.setting, compile=True)
    cases = [build_case(ours, setting), build_case(plain, setting), build_case(plain, suite.setting)]
    results = suite.compare(setting, *cases)
    against_eager = _time_ratio(results[0], results[2]).median
    note = f"both compiled; ours compiled over {plain} eager: {against_eager:.2f}"
    return Figure(_time_ratio(*results[:2]), results, note)


def _throughput(suite: Suite, ours: str, plain: str) -> Figure:
    results = suite.compare(suite.setting, plain, ours)
    rates = ", ".join(f"{result.case.label} {result.images_per_second:,.0f} images/s" for result in results)
    return Figure(_time_ratio(*results), results, rates)


def _attention_floor(suite: Suite, shape: str) -> Figure:
    """Time over the time to move q, k, v and the output: each read or written once forward, and, backward, all read
    again with the output's gradient, and three gradients written."""
    (result,) = suite.compare(suite.setting, f"attention:{shape}")
    assert result.seconds is not None
    traffic = 3 * result.case.traffic
    floor = traffic / suite.rooflines[suite.setting.dtype].copy
    times = Samples(tuple(seconds / floor for seconds in result.seconds.values))
    return Figure(times, [result], f"floor {floor * 1e3:.3f} ms for {traffic / GIB:.2f} GiB")


def _batch_per_gib(suite: Suite, name: str) -> Figure:
    """Images that fit a GiB, ours over the reference's: from the growth of the peak between two batch sizes, because
    the weights' share says nothing about the largest batch."""
    check_parity(build_case(name, replace(suite.setting, batch_size=2)))
    growth = []
    for impl, batch in (("reference", 4), ("auto", 32)):
        peaks = []
        for size in (batch, 2 * batch):
            case = build_case(name, replace(suite.setting, batch_size=size), impl)
            case.train_step()
            case.clear()
            peaks.append(peak_bytes(case.train_step, suite.device))
        growth.append((peaks[1] - peaks[0]) / batch)
    rates = [GIB / bytes_per_image for bytes_per_image in growth]
    note = f"{rates[1]:.1f} images a GiB against {rates[0]:.1f}"
    return Figure(Samples((growth[0] / growth[1],)), note=note)


def _need_compiler() -> None:
    if cxx_compiler() is None:
        raise NotMeasuredError("torch.compile needs a C++ compiler")


_SWIN = "swin_tiny_patch4_window7_224"
_SPEEDUP = "block {} forward + backward, batch 4: authors' time / ours"
_STEP = "{} training step: time / {}, 224², batch 4"
_RATE = "{} training images/s / {}, 224², bf16, channels_last, batch 128"

TARGETS: tuple[Target, ...] = (
    *(
        Target(f"block_{shape}", _SPEEDUP.format(shape), "cpu", limit, True, partial(_block, shape=shape))
        for shape, limit in (("64x56", 14), ("128x28", 12), ("256x14", 12), ("512x7", 6))
    ),
    Target(
        "block_64x56_compiled",
        _SPEEDUP.format("64x56 compiled"),
        "cpu",
        20,
        True,
        partial(_compiled_block, shape="64x56"),
    ),
    Target(
        "block_64x56_memory",
        "block 64x56 peak memory, forward + backward, batch 8: authors' / ours",
        "cpu",
        7,
        True,
        partial(_block_memory, shape="64x56"),
    ),
    Target(
        "resnet26",
        _STEP.format("ACmix-ResNet-26", "timm resnet26"),
        "cpu",
        2.0,
        False,
        partial(_network, ours="acmix_resnet26", plain="resnet26", theirs="authors:resnet26"),
    ),
    Target(
        "resnet26_compiled",
        _STEP.format("ACmix-ResNet-26 compiled", "timm resnet26 compiled"),
        "cpu",
        1.5,
        False,
        partial(_compiled_network, ours="acmix_resnet26", plain="resnet26"),
    ),
    Target(
        "swin_tiny",
        _STEP.format("ACmix-Swin-T", "timm Swin-T"),
        "cpu",
        1.10,
        False,
        partial(_network, ours="acmix_swin_tiny", plain=_SWIN, theirs="authors:swin_tiny"),
    ),
    Target(
        "resnet50",
        _RATE.format("ACmix-ResNet-50", "torchvision ResNet-50"),
        "cuda",
        0.6,
        True,
        partial(_throughput, ours="acmix_resnet50", plain="torchvision:resnet50"),
    ),
    Target(
        "attention_floor",
        "local attention 64x56 forward + backward, bf16, batch 128: time / memory floor",
        "cuda",
        4,
        False,
        partial(_attention_floor, shape="64x56"),
    ),
    Target(
        "swin_tiny_rate",
        _RATE.format("ACmix-Swin-T", "timm Swin-T"),
        "cuda",
        0.95,
        True,
        partial(_throughput, ours="acmix_swin_tiny", plain=_SWIN),
    ),
    Target(
        "resnet50_batch",
        "ACmix-ResNet-50 images per GiB at 224², bf16: ours / the reference operation's",
        "cuda",
        8,
        True,
        partial(_batch_per_gib, name="acmix_resnet50"),
    ),
    *LOADER_TARGETS,
)
