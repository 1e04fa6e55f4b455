// Stands in for libnvinfer.so where loading it is tested: it has a version and starts no runtime.
#include <cstdint>

extern "C" {
#ifndef NO_SYMBOLS
std::int32_t getInferLibMajorVersion() noexcept { return VERSION_MAJOR; }
std::int32_t getInferLibMinorVersion() noexcept { return VERSION_MINOR; }
std::int32_t getInferLibPatchVersion() noexcept { return 1; }
std::int32_t getInferLibBuildVersion() noexcept { return 48; }
void* createInferRuntime_INTERNAL(void* /*logger*/, std::int32_t /*version*/) noexcept { return nullptr; }
#endif
}
