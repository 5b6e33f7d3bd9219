"""Device arrays: shapes, views and copies only."""

import math

import numpy as np

from cupy.cuda import memory, runtime, stream


class MemoryPointer:
    def __init__(self, ptr):
        self.ptr = ptr


class ndarray:
    """A C-contiguous device array without arithmetic."""

    __array_ufunc__ = None  # NumPy's functions and operators raise TypeError
    __hash__ = None

    def __init__(self, owner, view):
        self._owner = owner  # the Allocation
        self._view = view  # a NumPy array of the same memory
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
        self._require_same_shape_and_dtype(out)
        queue = _queue(stream)
        queue.forbid_while_capturing()
        runtime._copy(out.ctypes.data, self.data.ptr, self.nbytes, runtime.memcpyDeviceToHost, queue)
        queue.synchronize()
        return out

    def set(self, arr, stream=None):
        if not isinstance(arr, np.ndarray):
            raise TypeError(f"only a numpy.ndarray can be set, not {type(arr).__name__}")
        self._require_same_shape_and_dtype(arr)
        values = np.ascontiguousarray(arr)
        runtime._copy(self.data.ptr, values.ctypes.data, self.nbytes, runtime.memcpyHostToDevice, _queue(stream))

    def fill(self, value):
        if value != 0:
            raise ValueError(f"fill({value!r}): only 0, which is a memset; the rest would be a kernel of CuPy's")
        runtime._set(self.data.ptr, 0, self.nbytes, _queue(None))

    def _require_same_shape_and_dtype(self, other):
        if other.dtype != self.dtype:
            raise TypeError(f"{other.dtype} on the host, {self.dtype} on the device")
        if other.shape != self.shape:
            raise ValueError(f"{list(other.shape)} on the host, {list(self.shape)} on the device")


def _unsupported(name):
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
    *(prefix + name for name in ARITHMETIC for prefix in ("", "r", "i")),
):
    setattr(ndarray, f"__{_name}__", _unsupported(f"__{_name}__"))


def _queue(given):
    return stream.queue_for(given)


def empty(shape, dtype=float):
    """Return an array whose memory is filled with ``memory.POISON``."""
    shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    dtype = np.dtype(dtype)
    owner = memory.Allocation(math.prod(shape) * dtype.itemsize)
    return ndarray(owner, owner.bytes.view(dtype).reshape(shape))


def zeros(shape, dtype=float):
    """Return an array that is zeroed on the current stream, as in CuPy."""
    array = empty(shape, dtype)
    array.fill(0)
    return array
