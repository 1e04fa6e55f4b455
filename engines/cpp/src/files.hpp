// Files of an engine directory, memory-mapped and checked against the manifest.
#pragma once

#include <cstddef>
#include <string>

#include "manifest.hpp"

namespace qwenport::detail {

/// A file's bytes, read-only, valid as long as this object lives.
class MappedFile {
 public:
  /// \throws Error bad_engine: the file cannot be read, or is not a regular file (nor is a symbolic link to one).
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  [[nodiscard]] const void* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t size() const noexcept { return size_; }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

/// Check a file's size and SHA-256 against its record. \throws Error bad_engine.
void check_file(const FileRecord& record, const std::string& directory, const MappedFile& file);

/// Check the size of a safetensors file, and the SHA-256 of its header, against its record: the values are not
/// read. \throws Error bad_engine.
void check_weights(const FileRecord& record, const std::string& directory, const MappedFile& file);

}  // namespace qwenport::detail
