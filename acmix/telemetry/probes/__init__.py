"""Probes measure the model while it trains. Each built-in one is a file in this folder, imported below."""

from acmix.telemetry.probes import paths
from acmix.telemetry.probes.probe import Probe, find_probes, register_probe

__all__ = ["Probe", "find_probes", "paths", "register_probe"]
