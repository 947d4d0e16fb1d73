"""dsv4: the device-neutral half: configuration, contracts, checkpoints, cache, graph, command line. No device code."""

__version__ = "0.1.0"
