// A library that a loader finds in onnxruntime's place: it computes nothing, so that a step costs what the runtime adds.
// It counts the tensors that are bound and the steps that are run.
//   VERSION       what it says it is
//   NO_SYMBOLS    it is no onnxruntime
#include <array>
#include <cstdint>

#include "onnxruntime/table.hpp"

extern "C" {
__attribute__((visibility("default"))) long stand_in_binds = 0;
__attribute__((visibility("default"))) long stand_in_steps = 0;
}

#ifndef NO_SYMBOLS

namespace {

namespace ort = qwenport::detail::ort;

int object = 0;  // whose address all objects have

template <typename Object>
ort::Status* make(Object** made) noexcept {
  *made = reinterpret_cast<Object*>(&object);
  return nullptr;
}

ort::Status* create_env(int /*level*/, const char* /*id*/, ort::Env** env) noexcept { return make(env); }
ort::Status* create_session(const ort::Env* /*env*/, const char* /*path*/,
                            const ort::SessionOptions* /*options*/, ort::Session** session) noexcept {
  return make(session);
}
ort::Status* create_tensor(const ort::MemoryInfo* /*info*/, void* /*data*/, std::size_t /*bytes*/,
                           const std::int64_t* /*shape*/, std::size_t /*rank*/, ort::ElementType /*type*/,
                           ort::Value** value) noexcept {
  return make(value);
}
ort::Status* create_memory_info(int /*allocator*/, int /*memory*/, ort::MemoryInfo** info) noexcept {
  return make(info);
}
ort::Status* set_threads(ort::SessionOptions* /*options*/, int /*threads*/) noexcept { return nullptr; }
ort::Status* add_entry(ort::SessionOptions* /*options*/, const char* /*key*/,
                       const char* /*value*/) noexcept {
  return nullptr;
}
ort::Status* create_binding(ort::Session* /*session*/, ort::IoBinding** binding) noexcept {
  return make(binding);
}
ort::Status* bind(ort::IoBinding* /*binding*/, const char* /*name*/, const ort::Value* /*value*/) noexcept {
  ++stand_in_binds;
  return nullptr;
}
ort::Status* run(ort::Session* /*session*/, const ort::RunOptions* /*options*/,
                 const ort::IoBinding* /*binding*/) noexcept {
  ++stand_in_steps;
  return nullptr;
}
template <typename Object>
void release(Object* /*object*/) noexcept {}

constexpr std::size_t functions = 400;

template <typename Slot>
void put(std::array<void*, functions>& table, typename Slot::Function function) {
  table[Slot::index] = reinterpret_cast<void*>(function);
}

void* const* get_api(std::uint32_t /*version*/) noexcept {
  static const std::array<void*, functions> table = [] {
    std::array<void*, functions> made{};
    put<ort::CreateEnv>(made, create_env);
    put<ort::CreateSession>(made, create_session);
    put<ort::CreateSessionOptions>(made, make<ort::SessionOptions>);
    put<ort::SetIntraOpNumThreads>(made, set_threads);
    put<ort::CreateTensorWithDataAsOrtValue>(made, create_tensor);
    put<ort::CreateCpuMemoryInfo>(made, create_memory_info);
    put<ort::ReleaseSession>(made, release<ort::Session>);
    put<ort::ReleaseValue>(made, release<ort::Value>);
    put<ort::ReleaseSessionOptions>(made, release<ort::SessionOptions>);
    put<ort::AddSessionConfigEntry>(made, add_entry);
    put<ort::RunWithBinding>(made, run);
    put<ort::CreateIoBinding>(made, create_binding);
    put<ort::ReleaseIoBinding>(made, release<ort::IoBinding>);
    put<ort::BindInput>(made, bind);
    put<ort::BindOutput>(made, bind);
    return made;
  }();
  return table.data();
}

const char* get_version() noexcept { return VERSION; }

constexpr ort::ApiBase base{get_api, get_version};

}  // namespace

extern "C" __attribute__((visibility("default"))) const ort::ApiBase* OrtGetApiBase() noexcept {
  return &base;
}

#endif
