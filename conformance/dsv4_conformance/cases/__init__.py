"""What ops are tried with: each op's cases, how their operands are filled, and cases as checks. How
a result is judged is in ``verdict``.
"""
