"""Loading a tokenizer and encoding documents on one thread: the C++ library or the `tokenizers` package.

python tokenizing.py '{"contender": "C++", "library": ..., "engine": ..., "documents": "a.json"}'
python tokenizing.py '{"contender": "tokenizers", "tokenizer": ..., "documents": "a.json"}'
"""

from __future__ import annotations

import ctypes as c
import hashlib
import json
import os
import sys
import time
from array import array
from collections.abc import Callable
from typing import Any

Encode = Callable[[list[str]], array]


def resident() -> int:
    """Resident bytes of this process that are no mapped files."""
    with open("/proc/self/status", encoding="utf-8") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    raise SystemExit("the kernel does not say how much memory is resident")


def cpp(request: dict[str, Any]) -> Callable[[], Encode]:
    """The C API of the library, called as any program calls it."""
    library = c.CDLL(request["library"])
    tokenizer = c.c_void_p()

    def load() -> Encode:
        if library.qwenport_tokenizer_load(request["engine"].encode(), c.byref(tokenizer)):
            library.qwenport_last_error.restype = c.c_char_p
            raise SystemExit(library.qwenport_last_error().decode())

        def encode(documents: list[str]) -> array:
            ids = array("q")
            tokens, count = c.POINTER(c.c_int64)(), c.c_size_t()
            places = c.byref(tokens), c.byref(count)
            for text in documents:
                data = text.encode()
                library.qwenport_tokenizer_encode(
                    tokenizer, data, c.c_size_t(len(data)), None, *places
                )
                ids.frombytes(c.string_at(tokens, 8 * count.value))
                library.qwenport_tokens_free(tokens)
            return ids

        return encode

    return load


def hugging_face(request: dict[str, Any]) -> Callable[[], Encode]:
    """The package, in the way that computes ids only."""
    from tokenizers import Tokenizer

    def load() -> Encode:
        tokenizer = Tokenizer.from_file(request["tokenizer"])

        def encode(documents: list[str]) -> array:
            ids = array("q")
            for encoding in tokenizer.encode_batch_fast(documents):
                ids.extend(encoding.ids)
            return ids

        return encode

    return load


def main() -> None:
    request = json.loads(sys.argv[1])
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with open(request["documents"], encoding="utf-8") as file:
        documents = json.load(file)
    prepare = {"C++": cpp, "tokenizers": hugging_face}[request["contender"]](request)
    before, start, used = resident(), time.perf_counter(), time.process_time()
    encode = prepare()
    load_seconds, load_cpu_seconds = time.perf_counter() - start, time.process_time() - used
    loaded_bytes = resident() - before
    encode(documents[:1])
    start = time.process_time()
    ids = encode(documents)
    seconds = time.process_time() - start
    size = sum(len(text.encode()) for text in documents)
    print(
        json.dumps(
            {
                "load_seconds": load_seconds,
                "load_cpu_seconds": load_cpu_seconds,
                "loaded_bytes": loaded_bytes,
                "bytes_per_second": size / seconds,
                "tokens": len(ids),
                "sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
            }
        )
    )


main()
