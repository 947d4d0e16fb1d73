"""The model as calls of contracts: layers, steps, caches, generation. Nothing here reads a file or
knows a device.
"""
