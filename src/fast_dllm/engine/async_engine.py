"""The engine beside asyncio: one thread ticks it, any number of consumers iterate over their own events."""

import asyncio
import ctypes
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from fast_dllm.config import DecodingConfig
from fast_dllm.decoding.events import Event
from fast_dllm.engine.engine import Engine
from fast_dllm.engine.request import Request
from fast_dllm.errors import FastDLLMError

_OMP_PAUSE_HARD = 2


class _Stream:
    """One consumer: what is on its way to it."""

    def __init__(self) -> None:
        self.arrived: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        self.request: Request | None = None


class AsyncEngine:
    """An engine in a thread of its own (torch releases the GIL), used as `async with AsyncEngine(engine)`.

    Only that thread touches the engine: consumers send it commands, which it obeys between two ticks.
    """

    def __init__(self, engine: Engine) -> None:
        """Wrap an engine.

        Args:
            engine: nobody else may use it until this one is closed.
        """
        self._engine = engine
        # None ends the thread.
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._streams: dict[int, _Stream] = {}  # by request id; the thread's
        self._open: set[_Stream] = set()  # the event loop's
        self._ended: BaseException | None = FastDLLMError("the engine is not running; use 'async with'")
        self._thread = threading.Thread(target=self._work, name="fast-dllm-engine", daemon=True)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._ended = None
        _release_openmp_threads()
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End all streams with an error, and the thread after the tick that it is in."""
        self._end(FastDLLMError("the engine was closed"))
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    async def stream(self, prompt: Sequence[int], decoding: DecodingConfig) -> AsyncIterator[Event]:
        """Decode a request.

        Leaving the iterator, or cancelling the task that is in it, cancels the request: it takes part in no forward
        after the one that is running. (To leave at a known moment, use `contextlib.aclosing`.)

        Args:
            prompt: token ids.
            decoding: what is asked.

        Yields:
            The request's events; the last one has a `finish`.

        Raises:
            FastDLLMError: for a request that cannot run, or when the engine is closed before it has ended.
            Exception: whatever a tick raised. The engine has stopped then, and every stream raises it.
        """
        if self._ended is not None:
            raise self._ended
        stream = _Stream()
        self._open.add(stream)
        self._commands.put(partial(self._submit, stream, list(prompt), decoding))
        try:
            while True:
                arrived = await stream.arrived.get()
                if isinstance(arrived, BaseException):
                    raise arrived
                yield arrived
                if arrived.finish is not None:
                    return
        finally:
            self._open.discard(stream)
            self._commands.put(partial(self._leave, stream))

    def _end(self, error: BaseException) -> None:
        """Tell every consumer, now and from now on."""
        if self._ended is None:
            self._ended = error
            for stream in self._open:
                stream.arrived.put_nowait(error)

    def _work(self) -> None:
        """The thread: run until told to end or until a tick fails, then leave the engine with nothing running."""
        error: BaseException | None = None
        try:
            while self._obey():
                self._tick()
        except BaseException as raised:
            error = raised
        try:
            for stream in [*self._streams.values()]:
                self._leave(stream)
        finally:  # nobody is to wait for an engine that cannot even let go
            if error is not None:
                self._post(partial(self._end, error))

    def _obey(self) -> bool:
        """Run the commands that have come, waiting for some while there is nothing to decode; whether to go on."""
        while self._engine.idle or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True

    def _tick(self) -> None:
        """One step of the engine; its events leave for the event loop in one go."""
        events = self._engine.step()
        self._post(partial(_deliver, [(self._streams[event.request], event) for event in events]))
        for event in events:
            if event.finish is not None:
                del self._streams[event.request]

    def _submit(self, stream: _Stream, prompt: list[int], decoding: DecodingConfig) -> None:
        try:
            stream.request = self._engine.submit(prompt, decoding)
        except Exception as error:
            self._post(partial(stream.arrived.put_nowait, error))
        else:
            self._streams[stream.request.id] = stream

    def _leave(self, stream: _Stream) -> None:
        if stream.request is not None and self._streams.pop(stream.request.id, None) is not None:
            self._engine.cancel(stream.request)

    def _post(self, callback: Callable[[], None]) -> None:
        """Run in the event loop."""
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            # The event loop was closed without leaving `async with`: nobody is listening any more.
            self._commands.put(None)


def _deliver(events: list[tuple[_Stream, Event]]) -> None:
    for stream, event in events:
        stream.arrived.put_nowait(event)


def _release_openmp_threads() -> None:
    """Give back the OpenMP threads of the calling thread; torch makes new ones when it next needs them here.

    The engine's thread gets its own. With both, libgomp counts more threads than cores and stops waiting actively:
    decoding on a CPU then took 2.7 times as long.
    """
    with suppress(OSError, AttributeError):  # another OpenMP, or one before version 5
        ctypes.CDLL("libgomp.so.1").omp_pause_resource_all(_OMP_PAUSE_HARD)
