// The part of onnxruntime's C API that this library calls, so that compiling needs no header of onnxruntime's.
//
// onnxruntime hands out a table of functions. Releases only append to it, so a function's index in the table is part of
// its binary interface. tests/cpp/test_onnxruntime_table.py compares the indices and signatures with a real header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qwenport::detail::ort {

// Objects of the library: only their addresses are known here.
struct Status;
struct Env;
struct MemoryInfo;
struct Session;
struct SessionOptions;
struct RunOptions;
struct IoBinding;
struct Value;

/// What the library's only symbol, OrtGetApiBase, returns.
struct ApiBase {
  void* const* (*get_api)(std::uint32_t version) noexcept;
  const char* (*get_version_string)() noexcept;
};

// Values of its enumerations.
constexpr int log_fatal = 4;         // OrtLoggingLevel
constexpr int device_allocator = 0;  // OrtAllocatorType
constexpr int memory_default = 0;    // OrtMemType
enum class ElementType : int { float32 = 1, int64 = 7 };

/// A function of the table: its index and its signature.
template <std::size_t Index, typename Signature>
struct Slot;
template <std::size_t Index, typename Result, typename... Arguments>
struct Slot<Index, Result(Arguments...)> {
  static constexpr std::size_t index = Index;
  using Function = Result (*)(Arguments...) noexcept;
};

// A function that returns a Status returns null if it succeeded.
using GetErrorMessage = Slot<2, const char*(const Status* status)>;
using CreateEnv = Slot<3, Status*(int log_level, const char* log_id, Env** env)>;
using CreateSession =
    Slot<7, Status*(const Env* env, const char* path, const SessionOptions* options, Session** session)>;
using CreateSessionOptions = Slot<10, Status*(SessionOptions** options)>;
using SetIntraOpNumThreads = Slot<24, Status*(SessionOptions* options, int threads)>;
using CreateTensorWithDataAsOrtValue =
    Slot<49, Status*(const MemoryInfo* info, void* data, std::size_t bytes, const std::int64_t* shape,
                     std::size_t rank, ElementType type, Value** value)>;
using CreateCpuMemoryInfo = Slot<69, Status*(int allocator, int memory, MemoryInfo** info)>;
using ReleaseStatus = Slot<93, void(Status* status)>;
using ReleaseSession = Slot<95, void(Session* session)>;
using ReleaseValue = Slot<96, void(Value* value)>;
using ReleaseSessionOptions = Slot<100, void(SessionOptions* options)>;
using AddSessionConfigEntry = Slot<130, Status*(SessionOptions* options, const char* key, const char* value)>;
using RunWithBinding =
    Slot<133, Status*(Session* session, const RunOptions* options, const IoBinding* binding)>;
using CreateIoBinding = Slot<134, Status*(Session* session, IoBinding** binding)>;
using ReleaseIoBinding = Slot<135, void(IoBinding* binding)>;
using BindInput = Slot<136, Status*(IoBinding* binding, const char* name, const Value* value)>;
using BindOutput = Slot<137, Status*(IoBinding* binding, const char* name, const Value* value)>;

}  // namespace qwenport::detail::ort
