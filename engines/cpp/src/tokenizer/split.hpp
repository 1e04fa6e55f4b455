// The pre-tokenizers: regular expressions and digit splitters, as code.
#pragma once

#include <cstddef>
#include <string_view>

#include "tokenizer/unicode.hpp"

namespace qwenport::detail {

/// A pre-tokenizer. The numbers are those of engines/text/tokenizer_json.py.
enum class Split : unsigned char {
  none = 0,
  digits = 1,           ///< Digits: each one by itself
  digit_runs = 2,       ///< Digits: those in a row together
  by_one_digit = 3,     ///< the regular expression of Qwen2
  by_three_digits = 4,  ///< that of Llama 3
  gpt2 = 5,             ///< that of ByteLevel
};

/// Where the first piece of a text ends. \param text valid UTF-8, not empty.
std::size_t piece_end(Split split, std::string_view text, const Unicode& unicode);

}  // namespace qwenport::detail
