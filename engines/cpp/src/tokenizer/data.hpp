// What an engine's tokenizer file holds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/split.hpp"

namespace qwenport::detail {

/// No token: of a byte that the vocabulary lacks.
constexpr std::uint32_t no_token = 0xFFFFFFFF;

/// A merge of two tokens; its rank is its place in the list.
struct MergeRule {
  std::uint32_t left;
  std::uint32_t right;
  std::uint32_t result;
};

/// A token that is looked for in the text itself, before the model sees it.
struct AddedToken {
  static constexpr std::uint32_t normalized = 1;  // looked for in the normalized text
  static constexpr std::uint32_t lstrip = 2;      // it takes the white space on its left, or right
  static constexpr std::uint32_t rstrip = 4;
  static constexpr std::uint32_t single_word = 8;  // found only where no word character is beside it
  static constexpr std::uint32_t special = 16;

  std::uint32_t id;
  std::uint32_t flags;
  std::uint32_t start;  // of its content in `text`, as UTF-8, and its bytes
  std::uint32_t size;
  [[nodiscard]] bool is(std::uint32_t flag) const noexcept { return (flags & flag) != 0; }
};

/// How many pre-tokenizers there may be.
constexpr std::size_t most_splits = 4;

/// Bits of a token.
constexpr std::uint8_t skipped = 1;  // in decoding, where special tokens are
constexpr std::uint8_t is_word = 2;  // its bytes as a piece of a text become this token alone

/// The content of a tokenizer file, checked: what it refers to exists.
struct TokenizerData {
  /// \param file its bytes. \param where its path, for messages.
  /// \throws Error bad_engine.
  TokenizerData(std::string_view file, const std::string& where);

  [[nodiscard]] std::size_t size() const noexcept { return flags.size(); }
  /// The bytes of a token, which need not be UTF-8; empty for an id that has none.
  [[nodiscard]] std::string_view bytes(std::size_t id) const noexcept {
    return std::string_view(text).substr(starts[id], starts[id + 1] - starts[id]);
  }
  [[nodiscard]] std::string_view content(const AddedToken& token) const noexcept {
    return std::string_view(text).substr(token.start, token.size);
  }

  bool nfc = false;
  std::vector<Split> splits;           // applied one after the other
  std::vector<std::uint32_t> of_byte;  // [256]
  std::vector<std::uint32_t> starts;   // of each token's bytes in `text`, and the end of the last
  std::vector<MergeRule> merges;       // by rank
  std::vector<AddedToken> added;
  std::vector<std::uint32_t> before;  // the tokens put around a text: BOS, EOS
  std::vector<std::uint32_t> after;
  std::vector<std::uint8_t> flags;  // of each token
  std::string text;
};

}  // namespace qwenport::detail
