// Engine::load: the backend that an engine was built for.
#include <vector>

#include "backends.hpp"
#include "contract.hpp"
#include "target.hpp"

namespace qwenport {
namespace {

struct Backend {
  const char* flavour;
  std::shared_ptr<const detail::Model> (*load)(detail::Manifest manifest, const std::string& directory,
                                               const EngineOptions& options);
};

/// Those that this library was configured for; at least one.
constexpr Backend backends[] = {
#ifdef QWENPORT_WITH_ONNXRUNTIME
    {contract::onnxruntime, detail::load_onnxruntime},
#endif
#ifdef QWENPORT_TENSORRT_FLAVOUR
    {QWENPORT_TENSORRT_FLAVOUR, detail::load_tensorrt},
#endif
};

}  // namespace

Engine Engine::load(const std::string& directory, const EngineOptions& options) {
  detail::Manifest manifest = detail::read_manifest(directory);
  std::vector<std::string> flavours;
  for (const Backend& backend : backends) flavours.emplace_back(backend.flavour);
  detail::check_flavour(manifest, directory, flavours);
  for (const Backend& backend : backends) {
    if (manifest.info.flavour != backend.flavour) continue;
    return Engine(backend.load(std::move(manifest), directory, options), directory,
                  options.require_self_test);
  }
  throw Error(ErrorCode::internal, "a flavour without a backend");
}

}  // namespace qwenport
