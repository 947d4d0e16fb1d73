"""How one call is run and judged: budgets, exact and discrete results, guards around buffers. What
is tried is in ``cases``.
"""
