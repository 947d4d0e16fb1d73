"""A model's files: what they may hold, reading, checking, making and copying them. Nothing here
computes with a weight.
"""
