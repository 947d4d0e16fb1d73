"""Whole models: recorded vectors, traces, the distance of native logits, and where two backends
part.
"""
