#include "files.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "sha256.hpp"

namespace qwenport::detail {

MappedFile::MappedFile(const std::string& path) {
  // A pipe would wait for its writer, and onnxruntime follows some symbolic links only.
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
  struct stat status{};
  bool ok = file >= 0 && fstat(file, &status) == 0;
  const bool regular = !ok || S_ISREG(status.st_mode);
  if (ok && regular && status.st_size > 0) {
    size_ = static_cast<std::size_t>(status.st_size);
    data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    ok = data_ != MAP_FAILED;
  }
  const int reason = errno;
  const bool is_link = file < 0 && reason == ELOOP;
  if (file >= 0) close(file);
  if (is_link) {
    throw Error(ErrorCode::bad_engine, path + ": a symbolic link; an engine directory holds files only");
  }
  if (!regular) throw Error(ErrorCode::bad_engine, path + ": not a regular file");
  if (!ok)
    throw Error(ErrorCode::bad_engine, path + ": cannot be read: " + std::generic_category().message(reason));
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(data_, size_);
}

namespace {

/// Check a file's size, and the SHA-256 of its first bytes.
void check_beginning(const FileRecord& record, const std::string& directory, const MappedFile& file,
                     std::size_t hashed) {
  const std::string path = directory + "/" + record.name;
  if (file.size() != record.bytes) {
    throw Error(ErrorCode::bad_engine, path + ": " + std::to_string(file.size()) +
                                           " bytes, the manifest says " + std::to_string(record.bytes) +
                                           "; build the engine again");
  }
  if (sha256(file.data(), std::min(hashed, file.size())) != record.sha256) {
    throw Error(ErrorCode::bad_engine,
                path + ": changed since it was built (another SHA-256); build the engine again");
  }
}

}  // namespace

void check_file(const FileRecord& record, const std::string& directory, const MappedFile& file) {
  check_beginning(record, directory, file, file.size());
}

void check_weights(const FileRecord& record, const std::string& directory, const MappedFile& file) {
  std::uint64_t header = 0;  // its length, little endian, is before it and hashed with it
  if (file.size() >= sizeof header) std::memcpy(&header, file.data(), sizeof header);
  const std::uint64_t rest = file.size() - std::min<std::uint64_t>(file.size(), sizeof header);
  check_beginning(record, directory, file, sizeof header + static_cast<std::size_t>(std::min(header, rest)));
}

}  // namespace qwenport::detail
