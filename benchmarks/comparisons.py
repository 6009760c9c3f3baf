"""How rows of the target table are measured that set networks, blocks and operations against each other."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

from acmix.ops.native import cxx_compiler
from benchmarks.cases import Case, Setting, build_case
from benchmarks.measure import Result
from benchmarks.parity import ParityError
from benchmarks.peak import peak_bytes
from benchmarks.suite import Figure, NotMeasuredError, Suite
from benchmarks.timing import Samples

GIB = 2**30


def network(
    suite: Suite,
    threads: int,
    *,
    ours: str,
    plain: str,
    mode: str = "train",
    channels_last: bool = False,
    theirs: str | None = None,
    **changes: int,
) -> Figure:
    """Time of our network over that of the plain one; the authors' beside them where there is a clone."""
    setting = suite.setting(threads, mode, channels_last=channels_last, **changes)
    cases = [build_case(ours, setting), build_case(plain, setting)]
    if theirs is not None and suite.authors is not None:
        cases += [suite.with_authors(setting, theirs, ours)[0]]
    results = suite.compare(*cases, mode=mode)
    notes = [f"authors: {_time_ratio(result, results[1]).median:.2f}" for result in results[2:]]
    return Figure(_time_ratio(*results[:2]), results, "; ".join(notes))


def compiled_network(suite: Suite, threads: int, *, ours: str, plain: str) -> Figure:
    """Time of our compiled training step over that of the plain network's."""
    _need_compiler()
    setting = suite.setting(threads, compile=True)
    results = suite.compare(build_case(ours, setting), build_case(plain, setting))
    return Figure(_time_ratio(*results), results)


def compiled_over_eager(suite: Suite, threads: int, *, name: str, mode: str = "train") -> Figure:
    """Time of a compiled network over the same without compilation."""
    _need_compiler()
    setting = suite.setting(threads, mode)
    results = suite.compare(build_case(name, replace(setting, compile=True)), build_case(name, setting), mode=mode)
    return Figure(_time_ratio(*results), results)


def scaling(suite: Suite, threads: int, *, subject: str) -> Figure:
    """Time on one thread over that on several: that of the layout which gains less, the other's in the note."""
    figures = {}
    for layout in ("NCHW", "channels_last"):
        settings = [suite.setting(count, channels_last=layout == "channels_last") for count in (1, threads)]
        cases = [build_case(subject, setting) for setting in settings]
        results = suite.compare(*cases, memory=False)
        figures[layout] = Figure(_time_ratio(*results), results)
    note = ", ".join(f"{layout} {figure.value.median:.2f}" for layout, figure in figures.items())
    least = min(figures.values(), key=lambda figure: figure.value.median)
    return Figure(least.value, [result for figure in figures.values() for result in figure.results], note)


def block(suite: Suite, threads: int, *, shape: str) -> Figure:
    """Time of the authors' block over ours, both in a process of their own.

    How long theirs takes depends on the memory that earlier work of a process has left to the allocator.
    """
    setting, names = suite.setting(threads), (f"authors:block:{shape}", f"block:{shape}")
    pair = suite.with_authors(setting, *names)
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        measured = process.submit(_measured_anew, names, setting, suite.seconds).result()
    results = [Result(case, "train", *figures) for case, figures in zip(pair, measured, strict=True)]
    return Figure(_time_ratio(*results), results)


def _measured_anew(names: Sequence[str], setting: Setting, seconds: float) -> list[tuple[Any, ...]]:
    """What `Result` says of each, from seconds to the share of the roof: without the cases, which hold networks."""
    cases = [build_case(name, setting) for name in names]
    results = Suite(setting.device, setting.authors, seconds).compare(*cases)
    return [(result.seconds, result.peak, result.multiply_adds, result.roofline) for result in results]


def compiled_block(suite: Suite, threads: int, *, shape: str) -> Figure:
    """Time of the authors' block over ours compiled."""
    _need_compiler()
    setting = suite.setting(threads)
    theirs, _ = suite.with_authors(setting, f"authors:block:{shape}", f"block:{shape}")
    results = suite.compare(theirs, build_case(f"block:{shape}", replace(setting, compile=True)))
    return Figure(_time_ratio(*results), results, "the authors' block eager, ours compiled")


def block_memory(suite: Suite, threads: int, *, shape: str) -> Figure:
    """Peak memory of the authors' block over ours."""
    setting = suite.setting(threads, batch_size=8)
    pair = suite.with_authors(setting, f"authors:block:{shape}", f"block:{shape}")
    peaks = []
    for case in pair:
        _prove(suite, case)
        case.train_step()
        case.clear()
        peaks.append(peak_bytes(case.train_step, suite.device))
    note = f"{peaks[0] / 2**20:.0f} MiB against {peaks[1] / 2**20:.0f} MiB"
    return Figure(Samples((peaks[0] / peaks[1],)), note=note)


def throughput(suite: Suite, threads: int, *, ours: str, plain: str) -> Figure:
    """Images a second of our training step over those of the plain network's."""
    results = suite.compare(*(build_case(name, suite.setting(threads)) for name in (plain, ours)))
    rates = ", ".join(f"{result.case.label} {result.images_per_second:,.0f} images/s" for result in results)
    return Figure(_time_ratio(*results), results, rates)


def attention_floor(suite: Suite, threads: int, *, shape: str) -> Figure:
    """Time over the time to move q, k, v and the output: each read or written once forward, and, backward, all read
    again with the output's gradient, and three gradients written."""
    setting = suite.setting(threads)
    (result,) = suite.compare(build_case(f"attention:{shape}", setting))
    assert result.seconds is not None
    traffic = 3 * result.case.traffic
    floor = traffic / suite.bench.roofline(setting).copy
    times = Samples(tuple(seconds / floor for seconds in result.seconds.values))
    return Figure(times, [result], f"floor {floor * 1e3:.3f} ms for {traffic / GIB:.2f} GiB")


def batch_per_gib(suite: Suite, threads: int, *, name: str) -> Figure:
    """Images that fit a GiB, ours over the reference's: from the growth of the peak between two batch sizes, because
    the weights' share says nothing about the largest batch."""
    _prove(suite, build_case(name, suite.setting(threads, batch_size=2)))
    growth = []
    for impl, batch in (("reference", 4), ("auto", 32)):
        peaks = []
        for size in (batch, 2 * batch):
            case = build_case(name, suite.setting(threads, batch_size=size), impl)
            case.train_step()
            case.clear()
            peaks.append(peak_bytes(case.train_step, suite.device))
        growth.append((peaks[1] - peaks[0]) / batch)
    rates = [GIB / bytes_per_image for bytes_per_image in growth]
    note = f"{rates[1]:.1f} images a GiB against {rates[0]:.1f}"
    return Figure(Samples((growth[0] / growth[1],)), note=note)


def _time_ratio(numerator: Result, denominator: Result) -> Samples:
    assert numerator.seconds is not None
    assert denominator.seconds is not None
    return numerator.seconds.over(denominator.seconds)


def _prove(suite: Suite, case: Case) -> None:
    if refusal := suite.bench.refusal(case):
        raise ParityError(refusal)


def _need_compiler() -> None:
    if cxx_compiler() is None:
        raise NotMeasuredError("torch.compile needs a C++ compiler")
