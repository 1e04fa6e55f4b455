// Whatever a tokenizer file's bytes are, reading it ends in a tokenizer that encodes and decodes any text, or in a bad_engine
// error. The size of the text at its end is corrected, so that it always fits.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "tokenizer/core.hpp"

namespace {

constexpr std::size_t text_bytes_at = 52;

void read(const std::string& file) {
  try {
    const qwenport::detail::TokenizerCore core(file, "fuzz");
    const auto tokens = core.encode("The quick <|im_start|> brown\n e\u0301 123 abc  \xff x", {});
    for (const qwenport::Token token : tokens) (void)core.bytes(token, /*skip_special_tokens=*/true);
  } catch (const qwenport::Error& error) {
    if (error.code() != qwenport::ErrorCode::bad_engine) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::string file(reinterpret_cast<const char*>(data), size);
  read(file);
  if (file.size() < text_bytes_at + sizeof(std::uint32_t)) return 0;
  std::uint32_t counts[5];  // tokens, merges, added, before, after
  std::memcpy(counts, file.data() + text_bytes_at - sizeof counts, sizeof counts);
  constexpr std::uint64_t fixed = text_bytes_at + 4 + std::uint64_t{4} * (256 + 1);
  const std::uint64_t before = fixed + std::uint64_t{5} * counts[0] + std::uint64_t{12} * counts[1] +
                               std::uint64_t{16} * counts[2] +
                               std::uint64_t{4} * (std::uint64_t{counts[3]} + counts[4]);
  if (before > file.size()) return 0;
  const auto rest = static_cast<std::uint32_t>(file.size() - before);
  std::memcpy(&file[text_bytes_at], &rest, sizeof rest);
  read(file);
  return 0;
}
