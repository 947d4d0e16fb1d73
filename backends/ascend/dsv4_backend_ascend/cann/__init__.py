"""The cann tier: contracts written in npu ops. Nothing here looks at the chip; ``plan`` decides
what may be called.
"""
