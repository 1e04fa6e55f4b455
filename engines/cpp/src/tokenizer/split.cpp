#include "tokenizer/split.hpp"

namespace qwenport::detail {
namespace {

/// A text, read character by character.
class Reader {
 public:
  Reader(std::string_view text, const Unicode& unicode) : text_(text), unicode_(unicode) {}

  struct Here {
    std::uint8_t classes;
    bool ends_line;
    std::size_t next;  // where the next character begins
    char32_t c;
  };
  /// At the end of the text a character of no class, whose `next` is its own place.
  [[nodiscard]] Here at(std::size_t place) const noexcept {
    const Character one = character_at(text_, place);
    if (one.size == 0) return {0, false, place, 0};
    return {unicode_.classes(one.c), one.c == '\n' || one.c == '\r', place + one.size, one.c};
  }
  [[nodiscard]] bool ended(std::size_t place) const noexcept { return place == text_.size(); }
  [[nodiscard]] bool is(std::size_t place, std::uint8_t classes) const noexcept {
    return (at(place).classes & classes) != 0;
  }
  /// Neither a space nor a letter nor a number: [^\s\p{L}\p{N}]
  [[nodiscard]] bool is_other(std::size_t place) const noexcept {
    return !ended(place) && !is(place, Classes::letter | Classes::number | Classes::space);
  }

  /// Where characters of a class end.
  [[nodiscard]] std::size_t skip(std::size_t place, std::uint8_t classes) const noexcept {
    for (Here here = at(place); (here.classes & classes) != 0; here = at(place)) place = here.next;
    return place;
  }
  [[nodiscard]] std::size_t skip_others(std::size_t place) const noexcept {
    while (is_other(place)) place = at(place).next;
    return place;
  }
  /// Where the contraction at an apostrophe ends, or `place`: 's, 't, 're, 've, 'm, 'll, 'd
  [[nodiscard]] std::size_t contraction(std::size_t place, bool any_case) const noexcept {
    const Here quote = at(place);
    if (quote.c != '\'') return place;
    const auto letter = [any_case](const Here& here) {
      if (any_case) return Unicode::contraction_letter(here.c);
      return here.c < 0x80 ? static_cast<char>(here.c) : '\0';
    };
    const Here first = at(quote.next);
    const char one = letter(first);
    if (one == 's' || one == 't' || one == 'm' || one == 'd') return first.next;
    const Here second = at(first.next);
    const char two = letter(second);
    const bool both = (two == 'e' && (one == 'r' || one == 'v')) || (two == 'l' && one == 'l');
    return both ? second.next : place;
  }
  /// \s+(?!\S)|\s+
  [[nodiscard]] std::size_t spaces(std::size_t place) const noexcept {
    std::size_t last = place;
    std::size_t end = place;
    for (Here here = at(place); (here.classes & Classes::space) != 0; here = at(end)) {
      last = end;
      end = here.next;
    }
    return ended(end) || last == place ? end : last;
  }

 private:
  std::string_view text_;
  const Unicode& unicode_;
};

// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|
// \s+(?!\S)|\s+
std::size_t qwen_end(const Reader& text, std::size_t place, int digits) {
  const Reader::Here first = text.at(place);
  if (const std::size_t end = text.contraction(place, /*any_case=*/true); end != place) return end;
  if ((first.classes & Classes::letter) != 0) return text.skip(first.next, Classes::letter);
  if ((first.classes & Classes::number) != 0) {
    std::size_t end = first.next;
    for (int i = 1; i < digits && text.is(end, Classes::number); ++i) end = text.at(end).next;
    return end;
  }
  if (!first.ends_line && text.is(first.next, Classes::letter)) return text.skip(first.next, Classes::letter);
  const std::size_t others = first.c == ' ' ? first.next : place;
  if (text.is_other(others)) {
    std::size_t end = text.skip_others(others);
    while (text.at(end).ends_line) end = text.at(end).next;
    return end;
  }
  std::size_t after_line = place;
  std::size_t end = place;
  for (Reader::Here here = first; (here.classes & Classes::space) != 0; here = text.at(end)) {
    end = here.next;
    if (here.ends_line) after_line = end;
  }
  return after_line != place ? after_line : text.spaces(place);
}

// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
std::size_t gpt2_end(const Reader& text, std::size_t place) {
  if (const std::size_t end = text.contraction(place, /*any_case=*/false); end != place) return end;
  const Reader::Here first = text.at(place);
  const std::size_t word = first.c == ' ' ? first.next : place;
  for (const std::uint8_t classes : {Classes::letter, Classes::number}) {
    if (text.is(word, classes)) return text.skip(word, classes);
  }
  if (text.is_other(word)) return text.skip_others(word);
  return text.spaces(place);
}

std::size_t digits_end(const Reader& text, std::size_t place, bool together) {
  const Reader::Here first = text.at(place);
  if ((first.classes & Classes::numeric) != 0) {
    return together ? text.skip(place, Classes::numeric) : first.next;
  }
  std::size_t end = first.next;
  while (!text.ended(end) && !text.is(end, Classes::numeric)) end = text.at(end).next;
  return end;
}

}  // namespace

std::size_t piece_end(Split split, std::string_view text, std::size_t at, const Unicode& unicode) {
  const Reader reader(text, unicode);
  switch (split) {
    case Split::digits:
      return digits_end(reader, at, /*together=*/false);
    case Split::digit_runs:
      return digits_end(reader, at, /*together=*/true);
    case Split::by_one_digit:
      return qwen_end(reader, at, 1);
    case Split::by_three_digits:
      return qwen_end(reader, at, 3);
    case Split::gpt2:
      return gpt2_end(reader, at);
    case Split::none:
      break;
  }
  return text.size();
}

}  // namespace qwenport::detail
