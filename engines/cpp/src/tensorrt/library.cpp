#include "library.hpp"

#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "contract.hpp"
#include "qwenport/qwenport.hpp"

namespace qwenport::detail {

#ifdef QWENPORT_TENSORRT_RTX
#ifndef TRT_MAJOR_RTX
#error "configured for TensorRT-RTX, but these are TensorRT's headers"
#endif
#else
#ifdef TRT_MAJOR_RTX
#error "configured for TensorRT, but these are TensorRT-RTX's headers"
#endif
#endif

namespace {

#ifdef QWENPORT_TENSORRT_RTX
constexpr const char* library_stem = "libtensorrt_rtx.so.";
#else
constexpr const char* library_stem = "libnvinfer.so.";
#endif

std::string versioned_name() { return library_stem + std::to_string(NV_TENSORRT_MAJOR); }

/// Keeps the latest messages, as many as fit: a plugin's own, and what TensorRT then says about it. TensorRT
/// keeps using the first logger of a process, so this one is never destroyed.
class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity > Severity::kERROR) return;
    const std::scoped_lock lock(mutex_);
    std::size_t used = std::strlen(text_.data());
    if (used + std::strlen(message) + 3 > text_.size()) used = 0;  // the newest matters most
    std::snprintf(text_.data() + used, text_.size() - used, "%s%s", used != 0 ? "; " : "", message);
  }
  std::string take() {
    const std::scoped_lock lock(mutex_);
    std::string text = text_.data();
    text_[0] = 0;
    return text;
  }

 private:
  std::mutex mutex_;
  std::array<char, 1024> text_{};
};

Logger& logger() {
  static auto* const one = new Logger;
  return *one;
}

template <typename Function>
Function symbol(void* library, const char* name) {
  void* const found = dlsym(library, name);
  if (found == nullptr) {
    throw Error(ErrorCode::missing_library, versioned_name() + " has no " + name + "; it is no TensorRT");
  }
  return reinterpret_cast<Function>(found);
}

}  // namespace

TensorRTLibrary::TensorRTLibrary() {
  void* const library = dlopen(versioned_name().c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* const reason = dlerror();  // NOLINT(concurrency-mt-unsafe): each thread has its own
    throw Error(ErrorCode::missing_library,
                std::string(QWENPORT_TENSORRT_FLAVOUR) +
                    " cannot be loaded: " + (reason != nullptr ? reason : "") +
                    "; put its folder into LD_LIBRARY_PATH, or the library beside libqwenport.so");
  }
  using Number = std::int32_t (*)() noexcept;
  const auto part = [library](const char* name) { return symbol<Number>(library, name)(); };
  const std::int32_t major = part("getInferLibMajorVersion");
  const std::int32_t minor = part("getInferLibMinorVersion");
  version_ = std::to_string(major) + "." + std::to_string(minor) + "." +
             std::to_string(part("getInferLibPatchVersion")) + "." +
             std::to_string(part("getInferLibBuildVersion"));
  if (major != NV_TENSORRT_MAJOR || minor < NV_TENSORRT_MINOR) {
    throw Error(ErrorCode::wrong_version, versioned_name() + " is " + version_ +
                                              ", but this library was compiled with the headers of " +
                                              std::to_string(NV_TENSORRT_MAJOR) + "." +
                                              std::to_string(NV_TENSORRT_MINOR) +
                                              "; compile it with the headers of the TensorRT that you ship");
  }
  create_runtime_ = symbol<decltype(create_runtime_)>(library, "createInferRuntime_INTERNAL");
}

const TensorRTLibrary& TensorRTLibrary::get() {
  static const TensorRTLibrary one;  // if the constructor throws, the next call tries again
  return one;
}

std::unique_ptr<nvinfer1::IRuntime> TensorRTLibrary::make_runtime() const {
  std::unique_ptr<nvinfer1::IRuntime> runtime(
      static_cast<nvinfer1::IRuntime*>(create_runtime_(&logger(), NV_TENSORRT_VERSION)));
  if (runtime == nullptr) throw Error(ErrorCode::device, "TensorRT refused to start" + tensorrt_complaint());
  return runtime;
}

std::string tensorrt_complaint() {
  std::string text = logger().take();
  for (char& c : text) c = c == '\n' ? ' ' : c;
  return text.empty() ? text : " (" + text + ")";
}

}  // namespace qwenport::detail
