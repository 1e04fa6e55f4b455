#include "passes.hpp"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <system_error>

#include "contract.hpp"
#include "files.hpp"
#include "sha256.hpp"

namespace qwenport::detail {
namespace {

using nlohmann::json;

/// An absolute path that the environment holds; empty if it holds none.
std::filesystem::path path_in(const char* variable) {
  const char* const value = std::getenv(variable);  // NOLINT(concurrency-mt-unsafe)
  const std::filesystem::path path = value != nullptr ? value : "";
  return path.is_absolute() ? path : std::filesystem::path();
}

json document(const PassKey& key, const Pass& pass) {
  return {{"format", contract::self_test_format},
          {"format_version", contract::self_test_version},
          {"key", key},
          {"cases", pass.cases},
          {"left_out", pass.left_out},
          {"marks", pass.marks}};
}

/// The number of a pass, or -1.
int count(const json& given, const char* name) {
  const auto found = given.find(name);
  const bool fits =
      found != given.end() && found->is_number_unsigned() && found->get<std::uint64_t>() <= 0x7fffffff;
  return fits ? found->get<int>() : -1;
}

bool write_whole(int file, const std::string& text) {
  std::size_t written = 0;
  while (written < text.size()) {
    const ssize_t more = write(file, text.data() + written, text.size() - written);
    if (more <= 0) return false;
    written += static_cast<std::size_t>(more);
  }
  return fsync(file) == 0;
}

}  // namespace

std::string pass_file(const PassKey& key) {
  std::filesystem::path folder = path_in("XDG_CACHE_HOME");
  if (folder.empty()) {
    folder = path_in("HOME");
    if (folder.empty()) return "";
    folder /= ".cache";
  }
  std::string lines;
  for (const std::string& line : key) lines += line + "\n";
  return folder / "qwenport" / contract::self_tests_folder / (sha256(lines.data(), lines.size()) + ".json");
}

bool is_remembered(const PassKey& key) {
  const std::string path = pass_file(key);
  if (path.empty()) return false;
  try {
    const MappedFile file(path);
    const auto* const text = static_cast<const char*>(file.data());
    const json given = json::parse(text, text + file.size(), nullptr, /*allow_exceptions=*/false);
    if (!given.is_object()) return false;
    const Pass pass{count(given, "cases"), count(given, "left_out"), count(given, "marks")};
    return pass.cases > 0 && pass.left_out >= 0 && pass.marks > 0 && given == document(key, pass);
  } catch (const Error&) {
    return false;
  }
}

bool remember(const PassKey& key, const Pass& pass) {
  const std::filesystem::path path = pass_file(key);
  if (path.empty()) return false;
  std::error_code error;
  std::filesystem::create_directories(path.parent_path(), error);
  std::string scratch = path.string() + ".XXXXXX";
  const int file = mkstemp(scratch.data());
  if (file < 0) return false;
  const bool written = write_whole(file, document(key, pass).dump() + "\n");
  close(file);
  if (written && std::rename(scratch.c_str(), path.c_str()) == 0) return true;
  unlink(scratch.c_str());
  return false;
}

void forget(const PassKey& key) {
  const std::string path = pass_file(key);
  if (!path.empty()) unlink(path.c_str());
}

}  // namespace qwenport::detail
