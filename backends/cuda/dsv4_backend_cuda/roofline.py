"""Occupancy, and what machine code predicts of a pass of its hot loop: a model, not a measurement.

It knows memory, products, instruction issue, slow conversions, and how long one block waits for its
own barriers and products where too few blocks share a multiprocessor to fill the gaps. It does not
know the shapes of instructions or how loads overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4_backend_cuda.launch import Work


@dataclass(frozen=True)
class Device:
    """Limits of a compute capability (CUDA programming guide) and the rates of one product that has
    it (its data sheet, dense).
    """

    product: str
    multiprocessors: int
    gigahertz: float
    gigabytes_per_second: float
    teraflops: dict[str, float]
    shared_per_multiprocessor: int
    shared_per_block: int
    warps: int
    blocks: int
    tensor_memory: int = 0


# Where the product figures were checked: pages that restate the vendor's data sheets, named beside
# each; the sheets themselves were not opened. Rates are dense (figures with sparsity are halved).
# Limits of shared memory, warps, blocks and tensor memory are the programming guide's, from memory:
# unchecked.
DEVICES = {
    # glennklockwood.com/garden/processors/A100: 54 TPCs of 2, 2039 GB/s, 312 TFLOPS; hmc-tech.com:
    # 1410 MHz. No FP8: BF16's rate.
    80: Device("A100 SXM 80 GB", 108, 1.41, 2039, {"bf16": 312, "fp8": 312}, 164 << 10, 163 << 10, 64, 32),
    # mullet.se (L40S): 864 GB/s, 142 RT cores (one a multiprocessor), 362.05 and 733 TFLOPS;
    # itcreations.com: boost 2520 MHz.
    89: Device("L40S", 142, 2.52, 864, {"bf16": 362, "fp8": 733}, 100 << 10, 99 << 10, 48, 24),
    # glennklockwood.com/garden/processors/h100 (SXM5): 132, 1.83 GHz, 989.4 and 1978.9 TFLOPS;
    # archive-lib.hpctech.co.jp: 3350 GB/s.
    90: Device("H100 SXM", 132, 1.83, 3350, {"bf16": 989, "fp8": 1979}, 228 << 10, 227 << 10, 64, 32),
    # glennklockwood.com/garden/processors/B200 (HGX): 2250 and 4500 TFLOPS, at most 8 TB/s;
    # hmc-tech.com: 148, tensor clock 1.86 GHz, and only 7.7 TB/s.
    100: Device("B200", 148, 1.86, 8000, {"bf16": 2250, "fp8": 4500}, 228 << 10, 227 << 10, 64, 32, 512),
    # topcpu.net: 188, about 2.6 GHz, 4000 TOPS of FP4; gpu.name: 1792 GB/s. The rates are inferred:
    # 4000 taken as sparse, FP8 a quarter, BF16 an eighth.
    120: Device("RTX PRO 6000 Blackwell", 188, 2.6, 1792, {"bf16": 504, "fp8": 1007}, 100 << 10, 99 << 10, 48, 24),
}
REGISTERS = 65536  # per multiprocessor, on all of them
RESERVED = 1 << 10  # bytes of shared memory that the driver keeps per block
ISSUE_SLOTS = 4  # warp instructions per cycle and multiprocessor
CONVERSION_LANES = 16  # per cycle and multiprocessor, on all of them
LAUNCH = 2.5e-6  # seconds from one kernel's last block to the next one's first loads, in a graph: a round figure


def blocks_per_multiprocessor(device: Device, *, registers: int, shared: int, warps: int, tensor_memory: int) -> int:
    """Thread blocks that fit on a multiprocessor at once; 0 if one does not."""
    per_warp = -(-registers * 32 // 256) * 256  # allocated in units of 256
    fits = [device.warps // warps, device.blocks, REGISTERS // (per_warp * warps)]
    if shared > device.shared_per_block or tensor_memory > device.tensor_memory:
        return 0
    fits.append(device.shared_per_multiprocessor // (shared + RESERVED))
    if tensor_memory:
        fits.append(device.tensor_memory // tensor_memory)
    return min(fits)


@dataclass(frozen=True)
class Estimate:
    """Cycles of one multiprocessor for one pass of the hot loop of each of its blocks, by what may
    take longest.

    ``waiting``: of a block that waits for itself, shared out over the blocks that run meanwhile.
    ``share``: what memory and products cannot do without, of what is predicted.
    """

    memory: float
    mma: float
    issue: float
    convert: float = 0.0
    waiting: float = 0.0

    @property
    def predicted(self) -> float:
        """Cycles of the busiest."""
        return max(self.memory, self.mma, self.issue, self.convert, self.waiting)

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return next(name for name, cycles in vars(self).items() if cycles == self.predicted)

    @property
    def share(self) -> float:
        """Time that memory and tensor cores must take, over the time that is predicted."""
        return max(self.memory, self.mma) / self.predicted


def estimate(
    device: Device, work: Work, *, instructions: int, warps: int, conversions: int = 0, stalls: int = 0, blocks: int = 1
) -> Estimate:
    """Apply the model: all multiprocessors share memory evenly; ``blocks`` share one and hide each
    other's waiting.
    """
    cycles = device.gigahertz * 1e9 * device.multiprocessors
    return Estimate(
        memory=work.bytes * cycles / (device.gigabytes_per_second * 1e9),
        mma=work.flops * cycles / (device.teraflops[work.rate] * 1e12),
        issue=instructions * warps / ISSUE_SLOTS,
        convert=conversions * warps * 32 / CONVERSION_LANES,
        waiting=(instructions * max(1.0, warps / ISSUE_SLOTS) + stalls) / max(blocks, 1),
    )
