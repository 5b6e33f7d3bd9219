"""Arrays on a device: shapes, views and copies, and nothing else."""

import math

import numpy as np

from cupy.cuda import memory, runtime, stream


class MemoryPointer:
    def __init__(self, ptr):
        self.ptr = ptr


class ndarray:
    """C-contiguous memory of a device. No arithmetic: that is what kernels are for."""

    __array_ufunc__ = None  # NumPy must not try either
    __hash__ = None

    def __init__(self, owner, view):
        self._owner = owner  # the Allocation
        self._view = view  # the same bytes to NumPy
        self.data = MemoryPointer(view.ctypes.data if view.size else 0)

    shape = property(lambda self: self._view.shape)
    dtype = property(lambda self: self._view.dtype)
    size = property(lambda self: self._view.size)
    nbytes = property(lambda self: self._view.nbytes)
    ndim = property(lambda self: self._view.ndim)
    itemsize = property(lambda self: self._view.itemsize)

    def __len__(self):
        return len(self._view)

    def __repr__(self):
        return f"<{self.dtype}{list(self.shape)} on device {self._owner.device}>"

    def reshape(self, *shape):
        return ndarray(self._owner, self._view.reshape(*shape))

    def view(self, dtype):
        return ndarray(self._owner, self._view.view(dtype))

    def __getitem__(self, key):
        keys = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(each, (int, np.integer, slice)) for each in keys):
            raise TypeError(f"{key!r}: only integers and slices are indices here")
        part = self._view[(*keys, ...)]
        if not part.flags.c_contiguous:
            raise ValueError(f"{key!r} of {list(self.shape)} is not contiguous, and kernels know no strides")
        return ndarray(self._owner, part)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def get(self, stream=None, *, out=None):
        if out is None:
            out = np.empty(self.shape, self.dtype)
        if not isinstance(out, np.ndarray) or not out.flags.c_contiguous or not out.flags.writeable:
            raise TypeError("out must be a writable C-contiguous numpy.ndarray")
        self._same(out)
        queue = _queue(stream)
        queue.forbid_while_capturing()
        runtime._copy(out.ctypes.data, self.data.ptr, self.nbytes, runtime.memcpyDeviceToHost, queue)
        queue.synchronize()
        return out

    def set(self, arr, stream=None):
        if not isinstance(arr, np.ndarray):
            raise TypeError(f"only a numpy.ndarray can be set, not {type(arr).__name__}")
        self._same(arr)
        values = np.ascontiguousarray(arr)
        runtime._copy(self.data.ptr, values.ctypes.data, self.nbytes, runtime.memcpyHostToDevice, _queue(stream))

    def fill(self, value):
        if value != 0:
            raise ValueError(f"fill({value!r}): only 0, which is a memset; the rest would be a kernel of CuPy's")
        runtime._set(self.data.ptr, 0, self.nbytes, _queue(None))

    def _same(self, other):
        if other.dtype != self.dtype:
            raise TypeError(f"{other.dtype} on the host, {self.dtype} on the device")
        if other.shape != self.shape:
            raise ValueError(f"{list(other.shape)} on the host, {list(self.shape)} on the device")


def _refuse(name):
    def refuse(self, *operands):
        raise TypeError(f"{name} on an array of a device: write a kernel, or copy it to the host with get()")

    return refuse


ARITHMETIC = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
)
for _name in (
    *("array", "bool", "contains", "float", "index", "int", "setitem", "abs", "neg", "invert"),
    *("eq", "ne", "lt", "le", "gt", "ge"),
    *(way + name for name in ARITHMETIC for way in ("", "r", "i")),
):
    setattr(ndarray, f"__{_name}__", _refuse(f"__{_name}__"))


def _queue(given):
    return stream.queue_for(given)


def empty(shape, dtype=float):
    """Poisoned memory."""
    shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    dtype = np.dtype(dtype)
    owner = memory.Allocation(math.prod(shape) * dtype.itemsize)
    return ndarray(owner, owner.bytes.view(dtype).reshape(shape))


def zeros(shape, dtype=float):
    """Zeroed in the order of the current stream, as CuPy does."""
    array = empty(shape, dtype)
    array.fill(0)
    return array
