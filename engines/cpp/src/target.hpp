// Whether an engine may run here: the flavour, the TensorRT release and the GPU, each checked against the
// manifest. Pure functions of what was found; each error says what to rebuild or install.
#pragma once

#include <string>

#include "manifest.hpp"

namespace qwenport::detail {

/// \param flavour this library was configured for. \throws Error wrong_version.
void check_flavour(const Manifest& manifest, const std::string& where, const std::string& flavour);

/// \param version of the TensorRT that was loaded, "10.14.1.48". \throws Error wrong_version.
void check_version(const Manifest& manifest, const std::string& where, const std::string& version);

/// \param gpu the local GPU's architecture, "sm90". \throws Error wrong_gpu.
void check_gpu(const Manifest& manifest, const std::string& where, const std::string& gpu);

/// An engine's architectures as a string, "sm80, sm90".
std::string gpu_list(const Manifest& manifest);

}  // namespace qwenport::detail
