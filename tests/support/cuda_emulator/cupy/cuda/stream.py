"""Streams that defer their work as long as CUDA permits, which reveals missing synchronization.

Work stays in a stream's queue until the host waits for it, by ``synchronize``, an event, or a copy to pageable memory.
A result that is read too early is still poisoned, a host buffer that is overwritten too early is copied with its new
content, and work that another stream should have waited for has not run. With LLMC_EMULATOR_SEED, work also runs at
random times, which reveals work that is submitted too early.
"""

import random
import sys
import threading
import time
import weakref
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from cupy._status import CUDARuntimeError, current, require_device, setting

FOLDER = str(Path(__file__).parent.parent)
MAX_PENDING = 256  # deferred tasks per queue
lock = threading.RLock()


class Task(NamedTuple):
    run: Any  # a function that accesses memory by address
    memory: tuple  # the owners of that memory, referenced until the task has run
    after: tuple  # (queue, position) pairs that must be reached first
    origin: str  # file:line of the caller


class Node(NamedTuple):
    """A task in a graph, which does not keep its memory allocated."""

    run: Any
    memory: tuple  # weak references to the owners
    origin: str


def _origin():
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(FOLDER):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class Queue:
    """The tasks of one stream. A ``blocking`` stream, CUDA's default, synchronizes with the null stream."""

    def __init__(self, device, blocking, null=False):
        self.device, self.blocking, self.null = device, blocking, null
        self.pending = deque()
        self.finished = 0
        self.nodes = None  # a list while capturing
        self.invalid = False  # whether the capture has been invalidated by an unsupported operation

    def tail(self):
        """Return the position reached when all pending tasks have run."""
        return self.finished + len(self.pending)

    def add(self, run, memory=(), after=()):
        with lock:
            if self.null:
                for queue in self._synchronized():
                    queue.forbid_while_capturing(906)
            if self.nodes is not None:
                if self.invalid:
                    raise CUDARuntimeError(901)
                self.nodes.append(Node(run, tuple(weakref.ref(owner) for owner in memory), _origin()))
                return
            earlier = tuple((queue, queue.tail()) for queue in self._synchronized() if queue.pending)
            self.pending.append(Task(run, tuple(memory), (*after, *earlier), _origin()))
            if len(self.pending) > MAX_PENDING:
                self.advance(self.finished + 1)
            _run_at_random()

    def _synchronized(self):
        """Return the other queues that this one synchronizes with implicitly."""
        if not self.blocking:
            return []
        return [
            queue
            for queue in _queues.values()
            if queue.device == self.device and queue.blocking and queue.null != self.null
        ]

    def advance(self, position):
        """Run pending tasks up to ``position``."""
        while self.finished < position and self.pending:
            task = self.pending.popleft()
            self.finished += 1
            for queue, until in task.after:
                queue.advance(until)
            try:
                task.run()
            except Exception as error:
                error.add_note(f"asked for at {task.origin}")
                discard_pending()
                raise

    def synchronize(self):
        with lock:
            self.forbid_while_capturing()
            self.advance(self.tail())

    def forbid_while_capturing(self, status=900):
        """Raise an error and invalidate the capture if one is active."""
        if self.nodes is not None:
            self.invalid = True
            raise CUDARuntimeError(status)


_queues = {}  # (device, pointer): Queue


def queue_of(pointer):
    """Return the queue of the stream with this pointer on the current device."""
    require_device(current.device)
    if pointer == 0:
        return _queues.setdefault((current.device, 0), Queue(current.device, blocking=True, null=True))
    if (current.device, pointer) not in _queues:
        raise CUDARuntimeError(400, f"no stream of device {current.device} has the pointer {pointer}")
    return _queues[current.device, pointer]


def queue_for(stream):
    """Return the queue of ``stream``, or of the current stream if it is None."""
    if stream is not None:
        return queue_of(stream.ptr)
    active = [pointer for device, pointer in current.streams if device == current.device]
    return queue_of(active[-1] if active else current.used.get(current.device, 0))


def synchronize_device():
    with lock:
        queues = [queue for queue in _queues.values() if queue.device == current.device]
        for queue in queues:
            queue.forbid_while_capturing()
        for queue in queues:
            queue.advance(queue.tail())


def forbid_while_capturing():
    """Raise an error if a stream of the current device is capturing.

    Allocations and module loads call this: on a GPU they may wait for the device, and a graph could use memory that has
    been reused when it is launched.
    """
    for queue in _queues.values():
        if queue.device == current.device:
            queue.forbid_while_capturing()


def discard_pending():
    """Discard all pending tasks, as after an error of the device."""
    for queue in _queues.values():
        queue.finished = queue.tail()
        queue.pending.clear()


_random = random.Random()
_random_seed = None


def _run_at_random():
    global _random_seed
    seed = setting("SEED", -1)
    if seed < 0:
        return
    if seed != _random_seed:
        _random.seed(seed)
        _random_seed = seed
    waiting = [queue for queue in _queues.values() if queue.pending]
    while waiting and _random.random() < 0.5:
        queue = _random.choice(waiting)
        queue.advance(queue.finished + 1)
        waiting = [queue for queue in waiting if queue.pending]


class Stream:
    null: "Stream"

    def __init__(self, null=False, non_blocking=False):
        if null:
            self.ptr, self.device_id = 0, -1
            return
        require_device(current.device)
        self.ptr, self.device_id = 0x1000 + len(_queues), current.device
        _queues[current.device, self.ptr] = Queue(current.device, blocking=not non_blocking)

    def use(self):
        self._require_current_device()
        current.used[current.device] = self.ptr
        return self

    def __enter__(self):
        self._require_current_device()
        current.streams.append((current.device, self.ptr))
        return self

    def __exit__(self, *details):
        current.streams.pop()

    def _require_current_device(self):
        if self.device_id not in (-1, current.device):
            raise RuntimeError(f"the stream is of device {self.device_id}, in use is device {current.device}")

    def synchronize(self):
        queue_of(self.ptr).synchronize()

    def record(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event):
        queue = queue_of(self.ptr)
        queue.forbid_while_capturing()
        if event.queue is not None:
            queue.add(lambda: None, after=((event.queue, event.position),))

    def begin_capture(self):
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        queue = queue_of(self.ptr)
        queue.forbid_while_capturing()
        queue.nodes = []

    def end_capture(self):
        queue = queue_of(self.ptr)
        if queue.nodes is None:
            raise CUDARuntimeError(1, "the stream is not capturing")
        nodes, queue.nodes = queue.nodes, None
        invalid, queue.invalid = queue.invalid, False
        if invalid:
            raise CUDARuntimeError(901)
        return Graph(nodes)


Stream.null = Stream(null=True)


class Graph:
    """Captured tasks, with the addresses and scalars of the capture."""

    def __init__(self, nodes):
        self._nodes = nodes

    def launch(self, stream=None):
        queue = queue_for(stream)
        for node in self._nodes:
            memory = tuple(owner() for owner in node.memory)
            if None in memory:
                raise CUDARuntimeError(700, f"the graph uses memory that has been freed, captured at {node.origin}")
            queue.add(node.run, memory)


class _Timestamp:
    time = None  # seconds; None until the stream reaches the event


class Event:
    def __init__(self, block=False, disable_timing=False):
        require_device(current.device)
        self.timed = not disable_timing
        self.queue = None
        self.position = 0
        self.timestamp = _Timestamp()

    def record(self, stream=None):
        queue = queue_for(stream)
        queue.forbid_while_capturing()
        timestamp = _Timestamp()

        def set_time():
            timestamp.time = time.perf_counter()

        with lock:
            self.timestamp, self.queue, self.position = timestamp, queue, queue.tail() + 1
            queue.add(set_time)

    @property
    def done(self):
        return self.queue is None or self.timestamp.time is not None

    def synchronize(self):
        if self.queue is not None:
            with lock:
                self.queue.advance(self.position)


def get_elapsed_time(start_event, end_event):
    """Return the milliseconds between two events, which must have completed."""
    for event in (start_event, end_event):
        if event.queue is None or not event.timed:
            raise CUDARuntimeError(400)
        if not event.done:
            raise CUDARuntimeError(600)
    return (end_event.timestamp.time - start_event.timestamp.time) * 1e3
