#include "target.hpp"

#include <algorithm>
#include <charconv>
#include <system_error>

#include "contract.hpp"

namespace qwenport::detail {

std::string gpu_list(const Manifest& manifest) {
  std::string text;
  for (const std::string& gpu : manifest.info.gpus) text += (text.empty() ? "" : ", ") + gpu;
  return text;
}

void check_flavour(const Manifest& manifest, const std::string& where,
                   const std::vector<std::string>& flavours) {
  const std::string& built = manifest.info.flavour;
  if (std::find(flavours.begin(), flavours.end(), built) != flavours.end()) return;
  std::string list;
  for (const std::string& flavour : flavours) list += (list.empty() ? "" : " and ") + flavour;
  std::string option = "QWENPORT_TENSORRT=ON";
  if (built == "tensorrt-rtx") option = "QWENPORT_TENSORRT=RTX";
  if (built == contract::onnxruntime) option = "QWENPORT_ONNXRUNTIME=ON";
  throw Error(ErrorCode::wrong_version, where + ": built for " + built +
                                            ", and this library was configured for " + list +
                                            "; build the engine with --target " + flavours.front() +
                                            ", or this library with -D" + option);
}

std::optional<std::pair<int, int>> release_number(const std::string& text) {
  const char* next = text.data();
  const char* const end = next + text.size();
  const auto number = [&]() -> std::optional<int> {
    int value = 0;
    const auto [stop, error] = std::from_chars(next, end, value);
    next = stop;
    return error == std::errc() && value >= 0 ? std::optional(value) : std::nullopt;
  };
  const std::optional<int> major = number();
  if (!major || next == end || *next != '.') return std::nullopt;
  ++next;
  const std::optional<int> minor = number();
  if (!minor || (next != end && *next != '.')) return std::nullopt;
  return std::pair{*major, *minor};
}

void check_oldest_version(const Manifest& manifest, const std::string& where, const std::string& version) {
  const std::string& oldest = manifest.info.runtime_version;
  if (release_number(version) >= release_number(oldest)) return;
  throw Error(ErrorCode::wrong_version,
              where + ": needs onnxruntime " + oldest + " or newer, installed is " + version + "; update it");
}

void check_version(const Manifest& manifest, const std::string& where, const std::string& version) {
  const std::string& built = manifest.info.runtime_version;
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
