"""Ascend NPUs through torch-npu and CANN: the portable PyTorch backend, with CANN's own ops where they serve."""
