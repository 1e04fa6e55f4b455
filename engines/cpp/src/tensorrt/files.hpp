// A file of an engine directory, mapped into memory.
#pragma once

#include <cstddef>
#include <string>

namespace qwenport::detail {

/// A file's bytes, read-only, as long as this lives.
class MappedFile {
 public:
  /// \throws Error bad_engine: the file cannot be read.
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

}  // namespace qwenport::detail
