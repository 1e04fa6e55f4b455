"""The structures of the C API, as qwenport.h and chat.h have them."""

from __future__ import annotations

import ctypes as c


class EngineInfo(c.Structure):
    _fields_ = [
        *((name, c.c_int) for name in ("vocab_size", "capacity", "max_batch", "max_step_tokens")),
        *((name, c.c_char_p) for name in ("dtype", "flavour", "runtime_version", "gpus")),
        ("cache_bytes_per_row", c.c_size_t),
        ("has_proof", c.c_int),
        *((name, c.c_char_p) for name in ("weights", "activations")),
    ]


class EngineOptions(c.Structure):
    _fields_ = [
        *((name, c.c_int) for name in ("gpu", "threads", "load")),
        ("onnxruntime", c.c_char_p),
        ("require_self_test", c.c_int),
    ]


class SelfTestReport(c.Structure):
    _fields_ = [
        *((n, c.c_int) for n in ("passed", "cases", "skipped", "steps", "marks", "remembered")),
        ("seconds", c.c_double),
        *((name, c.c_int) for name in ("call", "row", "position", "span")),
        *((name, c.c_double) for name in ("error", "bound")),
        ("case_name", c.c_char * 64),
        ("summary", c.c_char * 256),
    ]


LOAD_MODES = {"fast_steps": 0, "fast_start": 1}


class SessionOptions(c.Structure):
    _fields_ = [("max_batch", c.c_int), ("capacity", c.c_int), ("cuda_graphs", c.c_int)]


ON_TOKEN = c.CFUNCTYPE(None, c.c_void_p, c.c_int, c.c_int64)
ON_LOGITS = c.CFUNCTYPE(
    None, c.c_void_p, c.c_int, c.POINTER(c.c_float), c.c_size_t, c.POINTER(c.c_int64), c.c_size_t
)


class GenerateOptions(c.Structure):
    _fields_ = [
        ("max_new_tokens", c.c_int),
        ("stop_tokens", c.POINTER(c.c_int64)),
        ("stop_token_count", c.c_size_t),
        ("stop_sequences", c.POINTER(c.POINTER(c.c_int64))),
        ("stop_sequence_sizes", c.POINTER(c.c_size_t)),
        ("stop_sequence_count", c.c_size_t),
        ("temperature", c.c_double),
        ("top_k", c.c_int64),
        ("top_p", c.c_double),
        ("repetition_penalty", c.c_double),
        ("seed", c.c_uint64),
        ("append", c.c_int),
        ("cancellation", c.c_void_p),
        ("on_logits", ON_LOGITS),
        ("logprobs", c.c_int),
    ]


class _Generated(c.Structure):
    _fields_ = [
        ("count", c.c_size_t),
        ("reason", c.c_int),
        ("stop_token", c.c_int64),
        ("stop_sequence", c.c_int),
        ("pending", c.c_size_t),
    ]


class EncodeOptions(c.Structure):
    _fields_ = [("add_special_tokens", c.c_int), ("split_special_tokens", c.c_int)]


class ChatOptions(c.Structure):
    _fields_ = [
        ("system", c.c_char_p),
        ("generate", GenerateOptions),
        ("stop_strings", c.POINTER(c.c_char_p)),
        ("stop_string_count", c.c_size_t),
        ("drop_oldest", c.c_int),
        ("session", SessionOptions),
    ]


class _Message(c.Structure):
    _fields_ = [("role", c.c_char_p), ("content", c.c_void_p), ("bytes", c.c_size_t)]


class _Reply(c.Structure):
    _fields_ = [
        ("text", c.c_void_p),
        ("bytes", c.c_size_t),
        *(
            (name, c.c_int)
            for name in ("reason", "stop_string", "prompt_tokens", "new_tokens", "dropped")
        ),
    ]


ON_TEXT = c.CFUNCTYPE(None, c.c_void_p, c.POINTER(c.c_char), c.c_size_t)


class Logprobs(c.Structure):
    _fields_ = [(name, c.c_void_p) for name in ("logprobs", "top_tokens", "top_logprobs")]
