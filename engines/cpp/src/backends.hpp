// How each backend loads an engine. load.cpp lists those that this library was configured for.
#pragma once

#include <memory>
#include <string>

#include "backend.hpp"

namespace qwenport::detail {

/// \throws Error bad_engine, missing_library, wrong_version, invalid_argument.
std::shared_ptr<const Model> load_onnxruntime(Manifest manifest, const std::string& directory,
                                              const EngineOptions& options);

/// \throws Error bad_engine, missing_library, wrong_gpu, wrong_version, device.
std::shared_ptr<const Model> load_tensorrt(Manifest manifest, const std::string& directory,
                                           const EngineOptions& options);

}  // namespace qwenport::detail
