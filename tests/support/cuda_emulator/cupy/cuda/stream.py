"""Streams that put off their work for as long as CUDA may.

Whatever is asked of a stream waits in its queue until somebody waits for it: ``synchronize``, an event, a copy into
memory that is not pinned. So a result that is read too early is poison still, a buffer of the host that is overwritten
too early is copied as overwritten, and a stream that should have waited for another one did not. With
LLMC_EMULATOR_SEED, work also starts at random moments, which shows the opposite: something done before its turn.
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
LONGEST = 256  # pieces of work that wait in one queue; a card would not wait forever either
lock = threading.RLock()


class Work(NamedTuple):
    run: Any  # knows addresses only
    memory: tuple  # who owns them: kept until it has run
    after: tuple  # (queue, position): work elsewhere that goes first
    origin: str  # file:line of who asked for it


class Node(NamedTuple):
    """Work in a graph, which keeps no memory alive."""

    run: Any
    memory: tuple  # of weak references
    origin: str


def _origin():
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(FOLDER):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class Queue:
    """The work of one stream, in order. ``blocking``: takes its turn with the null stream, as CUDA's default is."""

    def __init__(self, device, blocking, null=False):
        self.device, self.blocking, self.null = device, blocking, null
        self.pending = deque()
        self.finished = 0
        self.nodes = None  # a list while capturing
        self.invalid = False  # whether something forbidden was asked for since the capture began

    def tail(self):
        """The position that is reached when all that waits now has run."""
        return self.finished + len(self.pending)

    def add(self, run, memory=(), after=()):
        with lock:
            if self.null:
                for queue in self._rivals():
                    queue.forbid_while_capturing(906)
            if self.nodes is not None:
                if self.invalid:
                    raise CUDARuntimeError(901)
                self.nodes.append(Node(run, tuple(weakref.ref(owner) for owner in memory), _origin()))
                return
            turns = tuple((queue, queue.tail()) for queue in self._rivals() if queue.pending)
            self.pending.append(Work(run, tuple(memory), (*after, *turns), _origin()))
            if len(self.pending) > LONGEST:
                self.advance(self.finished + 1)
            _run_at_random()

    def _rivals(self):
        """Queues whose work is in order with this one's, though they are others."""
        if not self.blocking:
            return []
        return [
            queue
            for queue in _queues.values()
            if queue.device == self.device and queue.blocking and queue.null != self.null
        ]

    def advance(self, position):
        """Run what waits, up to ``position``."""
        while self.finished < position and self.pending:
            work = self.pending.popleft()
            self.finished += 1
            for queue, until in work.after:
                queue.advance(until)
            try:
                work.run()
            except Exception as error:
                error.add_note(f"asked for at {work.origin}")
                abandon()
                raise

    def synchronize(self):
        with lock:
            self.forbid_while_capturing()
            self.advance(self.tail())

    def forbid_while_capturing(self, status=900):
        """What is asked for cannot be captured: an error, and the end of the capture."""
        if self.nodes is not None:
            self.invalid = True
            raise CUDARuntimeError(status)


_queues = {}  # (device, pointer): Queue


def queue_of(pointer):
    """The queue of the stream with this pointer, on the device in use."""
    require_device(current.device)
    if pointer == 0:
        return _queues.setdefault((current.device, 0), Queue(current.device, blocking=True, null=True))
    if (current.device, pointer) not in _queues:
        raise CUDARuntimeError(400, f"no stream of device {current.device} has the pointer {pointer}")
    return _queues[current.device, pointer]


def queue_for(stream):
    """The queue of ``stream``, or of the current one where it is None."""
    if stream is not None:
        return queue_of(stream.ptr)
    here = [pointer for device, pointer in current.streams if device == current.device]
    return queue_of(here[-1] if here else current.used.get(current.device, 0))


def synchronize_device():
    with lock:
        mine = [queue for queue in _queues.values() if queue.device == current.device]
        for queue in mine:
            queue.forbid_while_capturing()
        for queue in mine:
            queue.advance(queue.tail())


def forbid_while_capturing():
    """Allocating and loading are not captured: on a card they may wait for the device, and where they do not, a graph
    would use memory that others have by the time it is launched."""
    for queue in _queues.values():
        if queue.device == current.device:
            queue.forbid_while_capturing()


def abandon():
    """Forget all that waits: after an error on the device nothing more can be expected of it."""
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
        self._require_its_device()
        current.used[current.device] = self.ptr
        return self

    def __enter__(self):
        self._require_its_device()
        current.streams.append((current.device, self.ptr))
        return self

    def __exit__(self, *details):
        current.streams.pop()

    def _require_its_device(self):
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
    """Captured work, with the addresses and the scalars that it was captured with."""

    def __init__(self, nodes):
        self._nodes = nodes

    def launch(self, stream=None):
        queue = queue_for(stream)
        for node in self._nodes:
            memory = tuple(owner() for owner in node.memory)
            if None in memory:
                raise CUDARuntimeError(700, f"the graph uses memory that has been freed, captured at {node.origin}")
            queue.add(node.run, memory)


class _Mark:
    time = None  # seconds, once the stream has come to it


class Event:
    def __init__(self, block=False, disable_timing=False):
        require_device(current.device)
        self.timed = not disable_timing
        self.queue = None
        self.position = 0
        self.mark = _Mark()

    def record(self, stream=None):
        queue = queue_for(stream)
        queue.forbid_while_capturing()
        mark = _Mark()

        def arrive():
            mark.time = time.perf_counter()

        with lock:
            self.mark, self.queue, self.position = mark, queue, queue.tail() + 1
            queue.add(arrive)

    @property
    def done(self):
        return self.queue is None or self.mark.time is not None

    def synchronize(self):
        if self.queue is not None:
            with lock:
                self.queue.advance(self.position)


def get_elapsed_time(start_event, end_event):
    """Milliseconds between two events, which must have been reached."""
    for event in (start_event, end_event):
        if event.queue is None or not event.timed:
            raise CUDARuntimeError(400)
        if not event.done:
            raise CUDARuntimeError(600)
    return (end_event.mark.time - start_event.mark.time) * 1e3
