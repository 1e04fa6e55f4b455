// Tokens that are looked for in the text itself, such as <|im_start|>.
#pragma once

#include <array>
#include <cstddef>
#include <string_view>
#include <vector>

#include "tokenizer/data.hpp"

namespace qwenport::detail {

/// Added tokens that are looked for together: those for the text as it is, or for the normalized text.
class AddedTokens {
 public:
  /// \param data must outlive this object.
  AddedTokens(const TokenizerData& data, bool normalized);

  /// A part of a text: an added token, or what is between two.
  struct Part {
    const AddedToken* token;  // null: text
    std::size_t start;
    std::size_t end;
  };
  /// Cut a text into parts, as `find_matches` of `tokenizers` does.
  /// \param text valid UTF-8. \param split_special special tokens are not looked for.
  [[nodiscard]] std::vector<Part> parts(std::string_view text, bool split_special,
                                        const Unicode& unicode) const;

 private:
  struct Match {
    const AddedToken* token;
    std::size_t start;
  };
  [[nodiscard]] Match find(std::string_view text, std::size_t from) const;
  [[nodiscard]] const AddedToken* longest(std::string_view text) const;

  const TokenizerData& data_;
  std::vector<const AddedToken*> tokens_;  // by content
  std::array<bool, 256> begins_{};         // the bytes that tokens begin with
};

}  // namespace qwenport::detail
