"""dsv4: the device-neutral half. Configuration, contracts, checkpoints, cache, graph and command line; never an array library's device code."""

__version__ = "0.1.0"
