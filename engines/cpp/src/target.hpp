// Whether an engine may run here: the flavour, the release of its runtime and the GPU, each checked against the
// manifest. Pure functions of what was found; each error says what to rebuild or install.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "manifest.hpp"

namespace qwenport::detail {

/// \param flavours that this library was configured for; at least one. \throws Error wrong_version.
void check_flavour(const Manifest& manifest, const std::string& where,
                   const std::vector<std::string>& flavours);

/// "1.26" or "1.32.0" as (1, 26) or (1, 32); nothing for any other text.
std::optional<std::pair<int, int>> release_number(const std::string& text);

/// \param version of the onnxruntime that was loaded, "1.32.0". \throws Error wrong_version: older than the engine's.
void check_oldest_version(const Manifest& manifest, const std::string& where, const std::string& version);

/// \param version of the TensorRT that was loaded, "10.14.1.48". \throws Error wrong_version.
void check_version(const Manifest& manifest, const std::string& where, const std::string& version);

/// \param gpu the local GPU's architecture, "sm90". \throws Error wrong_gpu.
void check_gpu(const Manifest& manifest, const std::string& where, const std::string& gpu);

/// An engine's architectures as a string, "sm80, sm90".
std::string gpu_list(const Manifest& manifest);

}  // namespace qwenport::detail
