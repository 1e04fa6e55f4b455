#include "tokenizer/added_tokens.hpp"

#include <algorithm>

namespace qwenport::detail {

AddedTokens::AddedTokens(const TokenizerData& data, bool normalized) : data_(data) {
  for (const AddedToken& token : data.added) {
    if (token.is(AddedToken::normalized) != normalized) continue;
    tokens_.push_back(&token);
    begins_[static_cast<unsigned char>(data.content(token).front())] = true;
  }
  std::sort(tokens_.begin(), tokens_.end(), [&data](const AddedToken* a, const AddedToken* b) {
    return data.content(*a) < data.content(*b);
  });
}

/// The longest token that a text begins with, or null.
const AddedToken* AddedTokens::longest(std::string_view text) const {
  const auto byte_of = [](std::string_view content, std::size_t at) {
    return static_cast<unsigned char>(content[at]);
  };
  const AddedToken* found = nullptr;
  auto first = tokens_.begin();  // the tokens that agree with the text so far
  auto last = tokens_.end();
  for (std::size_t size = 0; first != last; ++size) {
    while (first != last && (*first)->size == size) found = *first++;
    if (size == text.size()) break;
    const unsigned char next = byte_of(text, size);
    first = std::partition_point(
        first, last, [&](const AddedToken* token) { return byte_of(data_.content(*token), size) < next; });
    last = std::partition_point(
        first, last, [&](const AddedToken* token) { return byte_of(data_.content(*token), size) == next; });
  }
  return found;
}

AddedTokens::Match AddedTokens::find(std::string_view text, std::size_t from) const {
  for (std::size_t at = from; at < text.size(); ++at) {
    if (!begins_[static_cast<unsigned char>(text[at])]) continue;
    if (const AddedToken* token = longest(text.substr(at))) return {token, at};
  }
  return {nullptr, text.size()};
}

std::vector<AddedTokens::Part> AddedTokens::parts(std::string_view text, bool split_special,
                                                  const Unicode& unicode) const {
  const auto is_word_at = [&](std::size_t at) {
    return at < text.size() && (unicode.classes(character_at(text, at).c) & Classes::word) != 0;
  };
  const auto is_space = [&](char32_t c) { return (unicode.classes(c) & Classes::white_space) != 0; };

  std::vector<Part> parts;
  std::size_t done = 0;
  std::size_t spaces_start = 0;  // the last white space that was skipped: it may be asked for again
  std::size_t spaces_end = 0;
  for (std::size_t from = 0; from < text.size() && !tokens_.empty();) {
    const auto [token, found] = find(text, from);
    if (token == nullptr) break;
    std::size_t start = found;
    std::size_t end = from = found + token->size;  // a match that is not wanted is passed all the same
    if (split_special && token->is(AddedToken::special)) continue;
    if (token->is(AddedToken::single_word)) {
      const bool word_before =
          start > 0 && (unicode.classes(character_before(text, start).c) & Classes::word) != 0;
      if (word_before || is_word_at(end)) continue;
    }
    if (token->is(AddedToken::lstrip)) {
      while (start > done) {
        const Character one = character_before(text, start);
        if (!is_space(one.c)) break;
        start -= one.size;
      }
      start = std::max(start, done);
    }
    if (token->is(AddedToken::rstrip)) {
      if (end >= spaces_start && end <= spaces_end) {
        end = spaces_end;
      } else {
        spaces_start = end;
        while (end < text.size() && is_space(character_at(text, end).c)) end += character_at(text, end).size;
        spaces_end = end;
      }
    }
    if (done < start) parts.push_back({nullptr, done, start});
    if (start < end) parts.push_back({token, start, end});
    done = end;
  }
  if (done != text.size()) parts.push_back({nullptr, done, text.size()});
  return parts;
}

}  // namespace qwenport::detail
