#include "library.hpp"

#include <dlfcn.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <map>
#include <mutex>
#include <system_error>

#include "../target.hpp"
#include "contract.hpp"
#include "qwenport/qwenport.hpp"

namespace qwenport::detail {
namespace {

constexpr const char* library_name = "libonnxruntime.so.1";

/// The library beside this one or beside the program, if there is one; else its name, which the loader looks for.
std::string found_library() {
  Dl_info self{};
  std::error_code unknown;
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe", unknown);
  const bool known = dladdr(reinterpret_cast<const void*>(&found_library), &self) != 0;
  for (const std::filesystem::path& file : {std::filesystem::path(known ? self.dli_fname : ""), program}) {
    const std::filesystem::path beside = file.parent_path() / library_name;
    if (file.has_parent_path() && access(beside.c_str(), R_OK) == 0) return beside;
  }
  return library_name;
}

std::string oldest() { return "1." + std::to_string(contract::oldest_onnxruntime_api); }

}  // namespace

OnnxRuntime::OnnxRuntime(void* library, const std::string& name) {
  const auto base = reinterpret_cast<const ort::ApiBase* (*)() noexcept>(dlsym(library, "OrtGetApiBase"));
  if (base == nullptr) {
    throw Error(ErrorCode::missing_library, name + " has no OrtGetApiBase; it is no onnxruntime");
  }
  version_ = base()->get_version_string();
  // Asked for a table that it does not have, onnxruntime also prints: so only if the version is new enough.
  if (release_number(version_) >= std::pair{1, contract::oldest_onnxruntime_api}) {
    table_ = base()->get_api(contract::oldest_onnxruntime_api);
  }
  if (table_ == nullptr) {
    throw Error(ErrorCode::wrong_version, name + " is onnxruntime " + version_ + ", engines need " +
                                              oldest() +
                                              " or newer; name another in EngineOptions::onnxruntime or "
                                              "QWENPORT_ONNXRUNTIME");
  }
  // Fatal: what fails is in an Error, and a library prints nothing.
  require<ort::CreateEnv>("to start", ort::log_fatal, "qwenport", &env_);
  require<ort::CreateCpuMemoryInfo>("the CPU's memory", ort::device_allocator, ort::memory_default, &cpu_);
}

const OnnxRuntime& OnnxRuntime::get(const std::string& path) {
  static std::mutex mutex;
  static auto* const loaded = new std::map<void*, const OnnxRuntime*>;  // by the loader's handle
  std::string name = path;
  if (name.empty()) {
    const char* const wanted = std::getenv("QWENPORT_ONNXRUNTIME");  // NOLINT(concurrency-mt-unsafe)
    name = wanted != nullptr && *wanted != 0 ? wanted : found_library();
  }
  struct stat status{};
  const bool is_path = name.find('/') != std::string::npos;
  if (is_path && stat(name.c_str(), &status) == 0 && !S_ISREG(status.st_mode)) {
    throw Error(ErrorCode::missing_library,
                name + ": not a regular file");  // dlopen would wait for a pipe's writer
  }
  const std::scoped_lock lock(mutex);
  // From release 1.29 on, onnxruntime tells Microsoft about the models that it loads, unless this is set before.
  setenv("ORT_DISABLE_TELEMETRY", "1", /*overwrite=*/0);  // NOLINT(concurrency-mt-unsafe)
  void* const library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* const reason = dlerror();  // NOLINT(concurrency-mt-unsafe): each thread has its own
    throw Error(ErrorCode::missing_library,
                std::string("onnxruntime cannot be loaded: ") + (reason != nullptr ? reason : "") +
                    "; install release " + oldest() +
                    " or newer (`pip install onnxruntime` has the library) and name its file in "
                    "QWENPORT_ONNXRUNTIME, or put it beside libqwenport.so as " +
                    library_name);
  }
  const auto found = loaded->find(library);
  if (found != loaded->end()) {
    dlclose(library);  // a second reference
    return *found->second;
  }
  return *loaded->emplace(library, new OnnxRuntime(library, name)).first->second;
}

std::string OnnxRuntime::message(ort::Status* status) const {
  std::string text = call<ort::GetErrorMessage>(status);
  call<ort::ReleaseStatus>(status);
  constexpr std::size_t longest = 300;
  if (text.size() > longest) text = text.substr(0, longest) + "...";
  return text;
}

void OnnxRuntime::refused(const char* what, ort::Status* status) const {
  throw Error(ErrorCode::device, std::string("onnxruntime refused ") + what + ": " + message(status));
}

}  // namespace qwenport::detail
