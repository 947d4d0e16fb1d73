"""A run of the suite: which checks, in which process, what was claimed, what it comes to. How a run
is shown is in ``report``.
"""
