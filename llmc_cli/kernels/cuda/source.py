"""The source text of the CUDA programs, as passed to NVRTC."""

from importlib.resources import files


def source(name: str) -> str:
    """Return the shared headers and ``name``.cu as one text without includes.

    CuPy caches compiled programs by their text, so every change of a header takes effect. ``#line`` directives keep
    the line numbers of the files.
    """
    folder = files("llmc_cli.kernels.cuda")
    parts = ("ptx.cuh", "common.cuh", f"{name}.cu")
    return "".join(f'#line 1 "{part}"\n{(folder / part).read_text(encoding="utf-8")}' for part in parts)
