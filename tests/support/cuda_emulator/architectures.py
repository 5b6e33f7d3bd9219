"""Limits of each GPU architecture.

Source: NVIDIA, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
"""

from typing import NamedTuple


class Architecture(NamedTuple):
    shared_per_block: int  # bytes that a kernel may opt in to, static and dynamic together
    shared_per_multiprocessor: int
    shared_reserved: int  # bytes per block reserved by the system
    threads_per_multiprocessor: int
    blocks_per_multiprocessor: int
    multiprocessors: int  # of the GPU named in the table


KB = 1024
SHARED_WITHOUT_OPT_IN = 48 * KB
REGISTERS = 65536  # per multiprocessor, and the maximum per block
THREADS_PER_BLOCK = 1024

ARCHITECTURES = {
    75: Architecture(64 * KB, 64 * KB, 0, 1024, 16, 40),  # T4
    80: Architecture(163 * KB, 164 * KB, KB, 2048, 32, 108),  # A100
    86: Architecture(99 * KB, 100 * KB, KB, 1536, 16, 82),  # RTX 3090
    89: Architecture(99 * KB, 100 * KB, KB, 1536, 24, 128),  # RTX 4090
    90: Architecture(227 * KB, 228 * KB, KB, 2048, 32, 132),  # H100
    100: Architecture(227 * KB, 228 * KB, KB, 2048, 32, 148),  # B200
    120: Architecture(99 * KB, 100 * KB, KB, 1536, 24, 170),  # RTX 5090
}
KNOWN = {70: Architecture(96 * KB, 96 * KB, 0, 2048, 32, 80), **ARCHITECTURES}  # V100: not supported by llmc


def blocks_at_once(capability: int, registers: int, threads: int, shared: int) -> int:
    """Return the number of blocks of a kernel that fit on one multiprocessor, possibly 0.

    ``registers`` is per thread and ``shared`` in bytes per block. Registers are allocated per warp in units of 256, and
    warps in groups of four.
    """
    architecture = ARCHITECTURES[capability]
    if shared > architecture.shared_per_block or threads > THREADS_PER_BLOCK:
        return 0
    warps = -(-threads // 32)
    registers_per_warp = -(-registers * 32 // 256) * 256
    warps_by_registers = REGISTERS // 4 // registers_per_warp * 4
    return min(
        architecture.blocks_per_multiprocessor,
        architecture.threads_per_multiprocessor // (warps * 32),
        warps_by_registers // warps,
        architecture.shared_per_multiprocessor // max(1, shared + architecture.shared_reserved),
    )
