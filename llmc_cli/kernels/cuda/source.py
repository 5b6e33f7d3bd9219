"""The text of the CUDA programs, as NVRTC takes it."""

from importlib.resources import files


def source(name: str) -> str:
    """``name``.cu behind what all programs share, in one piece: it includes nothing, so that a cache of compiled
    programs that goes by the text notices every change. Lines are numbered as in their files."""
    folder = files("llmc_cli.kernels.cuda")
    parts = ("ptx.cuh", "common.cuh", f"{name}.cu")
    return "".join(f'#line 1 "{part}"\n{(folder / part).read_text(encoding="utf-8")}' for part in parts)
