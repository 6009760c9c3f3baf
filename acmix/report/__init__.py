"""Runs and studies as one page: what was run, what came of it, what the paths did, where the network errs."""
