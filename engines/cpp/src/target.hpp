// Whether an engine may run here: its flavour, its TensorRT release and its GPU, each held against the
// manifest. Pure functions of what was found; each error says what to build again or install.
#pragma once

#include <string>

#include "manifest.hpp"

namespace qwenport::detail {

/// \param flavour this library was configured for. \throws Error wrong_version.
void check_flavour(const Manifest& manifest, const std::string& where, const std::string& flavour);

/// \param version of the TensorRT that was loaded, "10.14.1.48". \throws Error wrong_version.
void check_version(const Manifest& manifest, const std::string& where, const std::string& version);

/// \param gpu the architecture at hand, "sm90". \throws Error wrong_gpu.
void check_gpu(const Manifest& manifest, const std::string& where, const std::string& gpu);

/// The architectures of an engine as a text, "sm80, sm90".
std::string gpu_list(const Manifest& manifest);

}  // namespace qwenport::detail
