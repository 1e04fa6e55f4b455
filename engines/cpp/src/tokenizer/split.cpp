#include "tokenizer/split.hpp"

namespace qwenport::detail {
namespace {

/// A text, read character by character; its first piece is looked for.
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
  [[nodiscard]] bool is(std::size_t place, unsigned classes) const noexcept {
    return (at(place).classes & classes) != 0;
  }
  /// Neither a space nor a letter nor a number: [^\s\p{L}\p{N}]
  [[nodiscard]] bool is_other(std::size_t place) const noexcept {
    return !ended(place) && !is(place, Classes::letter | Classes::number | Classes::space);
  }

  /// Where characters of a class end.
  [[nodiscard]] std::size_t skip(std::size_t place, unsigned classes) const noexcept {
    for (Here here = at(place); (here.classes & classes) != 0; here = at(place)) place = here.next;
    return place;
  }
  [[nodiscard]] std::size_t skip_others(std::size_t place) const noexcept {
    while (is_other(place)) place = at(place).next;
    return place;
  }
  /// Where a contraction at the beginning ends, or 0: 's, 't, 're, 've, 'm, 'll, 'd
  [[nodiscard]] std::size_t contraction(bool any_case) const noexcept {
    const Here quote = at(0);
    if (quote.c != '\'') return 0;
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
    return both ? second.next : 0;
  }
  /// \s+(?!\S)|\s+ at the beginning
  [[nodiscard]] std::size_t spaces() const noexcept {
    std::size_t last = 0;
    std::size_t end = 0;
    for (Here here = at(0); (here.classes & Classes::space) != 0; here = at(end)) {
      last = end;
      end = here.next;
    }
    return ended(end) || last == 0 ? end : last;
  }

 private:
  std::string_view text_;
  const Unicode& unicode_;
};

// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|
// \s+(?!\S)|\s+
std::size_t qwen_end(const Reader& text, int digits) {
  const Reader::Here first = text.at(0);
  if (const std::size_t end = text.contraction(/*any_case=*/true)) return end;
  if ((first.classes & Classes::letter) != 0) return text.skip(first.next, Classes::letter);
  if ((first.classes & Classes::number) != 0) {
    std::size_t end = first.next;
    for (int i = 1; i < digits && text.is(end, Classes::number); ++i) end = text.at(end).next;
    return end;
  }
  if (!first.ends_line && text.is(first.next, Classes::letter)) return text.skip(first.next, Classes::letter);
  const std::size_t others = first.c == ' ' ? first.next : 0;
  if (text.is_other(others)) {
    std::size_t end = text.skip_others(others);
    while (text.at(end).ends_line) end = text.at(end).next;
    return end;
  }
  std::size_t after_line = 0;
  std::size_t end = 0;
  for (Reader::Here here = first; (here.classes & Classes::space) != 0; here = text.at(end)) {
    end = here.next;
    if (here.ends_line) after_line = end;
  }
  return after_line != 0 ? after_line : text.spaces();
}

// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
std::size_t gpt2_end(const Reader& text) {
  if (const std::size_t end = text.contraction(/*any_case=*/false)) return end;
  const Reader::Here first = text.at(0);
  const std::size_t start = first.c == ' ' ? first.next : 0;
  for (const unsigned classes : {Classes::letter, Classes::number}) {
    if (text.is(start, classes)) return text.skip(start, classes);
  }
  if (text.is_other(start)) return text.skip_others(start);
  return text.spaces();
}

std::size_t digits_end(const Reader& text, bool together) {
  const Reader::Here first = text.at(0);
  if ((first.classes & Classes::numeric) != 0) {
    return together ? text.skip(first.next, Classes::numeric) : first.next;
  }
  std::size_t end = first.next;
  while (!text.ended(end) && !text.is(end, Classes::numeric)) end = text.at(end).next;
  return end;
}

}  // namespace

std::size_t piece_end(Split split, std::string_view text, const Unicode& unicode) {
  const Reader reader(text, unicode);
  switch (split) {
    case Split::digits:
      return digits_end(reader, /*together=*/false);
    case Split::digit_runs:
      return digits_end(reader, /*together=*/true);
    case Split::by_one_digit:
      return qwen_end(reader, 1);
    case Split::by_three_digits:
      return qwen_end(reader, 3);
    case Split::gpt2:
      return gpt2_end(reader);
    case Split::none:
      break;
  }
  return text.size();
}

}  // namespace qwenport::detail
