// Whatever a manifest's bytes are, parsing ends in a Manifest whose sizes are sane or in a bad_engine error.
// The target has libFuzzer's form; fuzz_driver.cpp runs it where there is no libFuzzer.
#include <cstdint>
#include <cstdlib>

#include "manifest.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const auto manifest =
        qwenport::detail::parse_manifest({reinterpret_cast<const char*>(data), size}, "fuzz");
    const bool sane = manifest.row_bytes(manifest.info.capacity) > 0 &&
                      manifest.info.max_step_tokens <= manifest.info.capacity &&
                      manifest.caches.size() % 2 == 0 && manifest.model.sha256.size() == 64;
    if (!sane) std::abort();
  } catch (const qwenport::Error& error) {
    if (error.code() != qwenport::ErrorCode::bad_engine) std::abort();
  }
  return 0;
}
