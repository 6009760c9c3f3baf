"""Probes measure the model while it trains. Each built-in one is a file in this folder, imported below."""

from acmix.telemetry.probes import balance, paths, shares
from acmix.telemetry.probes.probe import Probe, find_probes, register_probe

__all__ = ["Probe", "balance", "find_probes", "paths", "register_probe", "shares"]
