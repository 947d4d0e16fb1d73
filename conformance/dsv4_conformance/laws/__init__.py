"""What holds of any input: laws of ops and of small models, and how examples of them are drawn.
Recorded models are in ``model``.
"""
