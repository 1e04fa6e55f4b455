#include "target.hpp"

#include <algorithm>

namespace qwenport::detail {

std::string gpu_list(const Manifest& manifest) {
  std::string text;
  for (const std::string& gpu : manifest.info.gpus) text += (text.empty() ? "" : ", ") + gpu;
  return text;
}

void check_flavour(const Manifest& manifest, const std::string& where, const std::string& flavour) {
  if (manifest.info.flavour == flavour) return;
  throw Error(ErrorCode::wrong_version,
              where + ": built for " + manifest.info.flavour + ", and this library was configured for " +
                  flavour + "; build the engine with --target " + flavour +
                  ", or this library with -DQWENPORT_TENSORRT=" + manifest.info.flavour);
}

void check_version(const Manifest& manifest, const std::string& where, const std::string& version) {
  const std::string& built = manifest.info.tensorrt_version;
  if (built == version) return;
  throw Error(ErrorCode::wrong_version, where + ": built by " + manifest.info.flavour + " " + built +
                                            ", installed is " + version +
                                            "; build it again or install that version");
}

void check_gpu(const Manifest& manifest, const std::string& where, const std::string& gpu) {
  const auto& gpus = manifest.info.gpus;
  if (std::find(gpus.begin(), gpus.end(), gpu) != gpus.end()) return;
  throw Error(ErrorCode::wrong_gpu, where + ": built for " + gpu_list(manifest) + ", this GPU is " + gpu +
                                        "; build again with --gpu " + gpu);
}

}  // namespace qwenport::detail
