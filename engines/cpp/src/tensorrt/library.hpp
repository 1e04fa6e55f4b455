// TensorRT or TensorRT-RTX, loaded with the first engine, so that a program starts without it and a
// missing library is an error message.
//
// The classes of the headers are used through their virtual tables, so the headers and the library must
// be of the same flavour and major version: otherwise a call lands in another function.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <string>

namespace qwenport::detail {

class TensorRTLibrary {
 public:
  /// This process's instance. \throws Error missing_library, wrong_version.
  static const TensorRTLibrary& get();

  /// "10.14.1.48"
  [[nodiscard]] const std::string& version() const noexcept { return version_; }
  /// \throws Error device.
  [[nodiscard]] std::unique_ptr<nvinfer1::IRuntime> make_runtime() const;

 private:
  TensorRTLibrary();

  void* (*create_runtime_)(void* logger, std::int32_t version) noexcept = nullptr;
  std::string version_;
};

/// TensorRT's messages since the last call, as " (message)"; empty if there are none.
std::string tensorrt_complaint();

}  // namespace qwenport::detail
