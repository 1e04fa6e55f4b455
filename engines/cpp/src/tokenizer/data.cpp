#include "tokenizer/data.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "contract.hpp"
#include "qwenport/qwenport.hpp"

namespace qwenport::detail {
namespace {

/// Numbers at the beginning of the file, all of 32 bits, little endian as this machine is.
struct Beginning {
  std::array<char, 20> format;
  std::uint32_t version;
  std::uint32_t nfc;
  std::array<std::uint8_t, most_splits> splits;
  std::uint32_t tokens;
  std::uint32_t merges;
  std::uint32_t added;
  std::uint32_t before;
  std::uint32_t after;
  std::uint32_t text_bytes;
};
static_assert(sizeof(Beginning) == 56);

constexpr std::uint64_t most_tokens = std::uint64_t{1} << 22U;  // 28 times Qwen's

/// What of the file is not read yet.
class Rest {
 public:
  Rest(std::string_view rest, const std::string& where) : rest_(rest), where_(where) {}

  [[noreturn]] void fail(const std::string& message) const {
    throw Error(ErrorCode::bad_engine, where_ + ": damaged: " + message);
  }
  void expect(bool holds, const char* what) const {
    if (!holds) fail(what);
  }
  template <typename T>
  void take(T* values, std::size_t count) {
    const std::size_t bytes = count * sizeof(T);
    expect(bytes <= rest_.size(), "it ends too early");
    rest_.copy(reinterpret_cast<char*>(values), bytes);
    rest_.remove_prefix(bytes);
  }
  template <typename T>
  void take(std::vector<T>& values, std::size_t count) {
    expect(count <= rest_.size() / sizeof(T), "it ends too early");
    values.resize(count);
    take(values.data(), count);
  }
  [[nodiscard]] std::string take_text(std::size_t bytes) {
    expect(bytes == rest_.size(), "its text is not of the size that it says");
    return std::string(rest_);
  }

 private:
  std::string_view rest_;
  const std::string& where_;
};

}  // namespace

TokenizerData::TokenizerData(std::string_view file, const std::string& where) {
  Rest rest(file, where);
  Beginning header{};
  rest.take(&header, 1);
  std::array<char, sizeof header.format> format{};
  static_assert(sizeof contract::tokenizer_format <= sizeof header.format);
  std::memcpy(format.data(), contract::tokenizer_format, sizeof contract::tokenizer_format);
  rest.expect(header.format == format, "not a tokenizer file");
  if (header.version != contract::tokenizer_version) {
    throw Error(ErrorCode::bad_engine, where + ": " + contract::tokenizer_format + " format version " +
                                           std::to_string(header.version) + ", this runtime reads " +
                                           std::to_string(contract::tokenizer_version) +
                                           "; build the engine again");
  }
  rest.expect(header.nfc <= 1, "no such normalizer");
  nfc = header.nfc == 1;
  for (const std::uint8_t split : header.splits) {
    rest.expect(split <= static_cast<std::uint8_t>(Split::gpt2), "no such pre-tokenizer");
    if (split != 0) splits.push_back(static_cast<Split>(split));
  }
  rest.expect(header.tokens <= most_tokens, "more tokens than any tokenizer has");

  rest.take(of_byte, 256);
  rest.take(starts, std::size_t{header.tokens} + 1);
  rest.take(merges, header.merges);
  rest.take(added, header.added);
  rest.take(before, header.before);
  rest.take(after, header.after);
  rest.take(flags, header.tokens);
  text = rest.take_text(header.text_bytes);

  const auto exists = [&](std::uint32_t id) { return id < header.tokens; };
  rest.expect(std::is_sorted(starts.begin(), starts.end()) && starts.back() <= text.size(),
              "tokens that are not inside its text");
  rest.expect(std::all_of(of_byte.begin(), of_byte.end(),
                          [&](std::uint32_t id) { return id == no_token || exists(id); }),
              "a byte of a token that does not exist");
  rest.expect(std::all_of(merges.begin(), merges.end(),
                          [&](const MergeRule& rule) {
                            return exists(rule.left) && exists(rule.right) && exists(rule.result);
                          }),
              "a merge of tokens that do not exist");
  for (const AddedToken& token : added) {
    rest.expect(exists(token.id), "an added token that does not exist");
    rest.expect(token.size > 0 && token.start <= text.size() && token.size <= text.size() - token.start &&
                    is_valid_utf8(content(token)),
                "an added token without a text");
  }
  rest.expect(
      std::all_of(before.begin(), before.end(), exists) && std::all_of(after.begin(), after.end(), exists),
      "a token around texts that does not exist");
}

}  // namespace qwenport::detail
