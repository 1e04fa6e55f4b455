"""Calls that a signal must not reach: in a thread of their own.

Python runs signal handlers in the main thread, wherever it is. If that is inside a callback of TensorRT (a logger, a
progress monitor), the handler's exception is lost between Python and C++, and the program goes on as if nothing had
happened.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TypeVar

Result = TypeVar("Result")


def run_apart(
    call: Callable[[], Result], stop: Callable[[BaseException], None] = lambda error: None
) -> Result:
    """Run `call` in another thread, and wait for it.

    Args:
        call: its exceptions are raised here.
        stop: called if a signal ends the waiting, with the exception of its handler (Ctrl-C: KeyboardInterrupt); may
            make `call` return early. What `call` returns or raises then is dropped, and that exception is raised.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="qwenport") as pool:
        future = pool.submit(call)
        try:
            return future.result()
        except BaseException as error:
            if not future.done():
                stop(error)
            while not future.done():
                with suppress(KeyboardInterrupt):  # a second one: it is ending already
                    wait([future])
            raise
