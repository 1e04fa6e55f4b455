// onnxruntime, loaded with the first engine that needs it, so that a program starts without it and a missing
// library is an error message.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "table.hpp"

namespace qwenport::detail {

/// An object of the library, released with its owner.
template <typename Object>
using Owned = std::unique_ptr<Object, std::function<void(Object*)>>;

class OnnxRuntime {
 public:
  /// This process's instance of a library.
  /// \param path of the library; empty: QWENPORT_ONNXRUNTIME, else libonnxruntime.so.1 beside this library, else
  ///   as the loader finds it.
  /// \throws Error missing_library, wrong_version.
  static const OnnxRuntime& get(const std::string& path);

  OnnxRuntime(const OnnxRuntime&) = delete;
  OnnxRuntime& operator=(const OnnxRuntime&) = delete;
  ~OnnxRuntime() = default;  // instances live as long as the process

  /// "1.32.0"
  [[nodiscard]] const std::string& version() const noexcept { return version_; }
  [[nodiscard]] const ort::Env* env() const noexcept { return env_; }
  [[nodiscard]] const ort::MemoryInfo* cpu() const noexcept { return cpu_; }

  /// Call a function of the table.
  template <typename Slot, typename... Arguments>
  auto call(Arguments... arguments) const {
    return reinterpret_cast<typename Slot::Function>(table_[Slot::index])(arguments...);
  }
  /// Call a function that returns a status: the message of a failure, on one line; empty if it succeeded.
  template <typename Slot, typename... Arguments>
  [[nodiscard]] std::string attempt(Arguments... arguments) const {
    ort::Status* const status = call<Slot>(arguments...);
    return status == nullptr ? std::string() : message(status);
  }
  /// Call a function that returns a status. \throws Error device: it failed. \param what was asked for.
  template <typename Slot, typename... Arguments>
  void require(const char* what, Arguments... arguments) const {
    if (ort::Status* const status = call<Slot>(arguments...)) refused(what, status);
  }
  /// \tparam Release the function that releases such an object.
  template <typename Release, typename Object>
  [[nodiscard]] Owned<Object> own(Object* object) const {
    return {object, [this](Object* released) { call<Release>(released); }};
  }

 private:
  OnnxRuntime(void* library, const std::string& name);
  [[nodiscard]] std::string message(ort::Status* status) const;
  [[noreturn]] void refused(const char* what, ort::Status* status) const;

  void* const* table_ = nullptr;
  ort::Env* env_ = nullptr;
  ort::MemoryInfo* cpu_ = nullptr;
  std::string version_;
};

}  // namespace qwenport::detail
