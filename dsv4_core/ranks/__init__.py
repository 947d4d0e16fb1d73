"""Several processes as one model: what they send each other and how a lost one is noticed. How
weights are cut is in ``checkpoint``.
"""
