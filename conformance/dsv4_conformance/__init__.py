"""The conformance suite: whether a backend computes DeepSeek-V4, how close to the edge each result
is, and what to fix.

``check`` says what a check is; each room below says in its first line what belongs there. Nothing
here names a backend.
"""
