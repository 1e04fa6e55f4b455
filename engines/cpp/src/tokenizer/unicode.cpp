#include "tokenizer/unicode.hpp"

#include <algorithm>
#include <utility>

namespace qwenport::detail {
namespace {

constexpr std::size_t code_points = 0x110000;

// Hangul syllables are composed by arithmetic (The Unicode Standard, 3.12).
constexpr char32_t first_syllable = 0xAC00;
constexpr char32_t first_leading = 0x1100;
constexpr char32_t first_vowel = 0x1161;
constexpr char32_t before_trailing = 0x11A7;
constexpr char32_t leadings = 19;
constexpr char32_t vowels = 21;
constexpr char32_t trailings = 28;
constexpr char32_t syllables = leadings * vowels * trailings;

/// Give each code point of the runs, and its class, to a function.
template <typename Take>
void for_runs(const Numbers& runs, const Take& take) {
  std::uint32_t c = 0;
  for (std::size_t i = 0; i < runs.size; i += 3) {
    c += runs.data[i];
    for (const std::uint32_t end = c + runs.data[i + 1]; c < end; ++c) {
      take(char32_t{c}, static_cast<std::uint8_t>(runs.data[i + 2]));
    }
  }
}

std::uint64_t pair_of(char32_t first, char32_t second) { return std::uint64_t{first} << 32U | second; }

}  // namespace

const Unicode& Unicode::tables() {
  static const Unicode made;
  return made;
}

Unicode::Unicode() : classes_(code_points, std::uint8_t{Classes::begins | Classes::stays}) {
  for_runs(class_runs, [this](char32_t c, std::uint8_t bits) { classes_[c] |= bits; });
  const auto never = [this](char32_t c, unsigned bit) {
    classes_[c] = static_cast<std::uint8_t>(classes_[c] & ~bit);
  };
  for_runs(combining_runs, [&](char32_t c, std::uint8_t rank) {
    ranks_.emplace(c, rank);
    never(c, Classes::begins);
  });
  for (char32_t c = first_vowel; c < first_vowel + vowels; ++c) never(c, Classes::begins);
  for (char32_t c = before_trailing + 1; c < before_trailing + trailings; ++c) never(c, Classes::begins);

  std::vector<char32_t> decomposed;
  const std::uint32_t* next = decompositions.data;
  for (char32_t c = 0; next != decompositions.data + decompositions.size; ++c) {
    c += *next++;
    const std::size_t count = *next / 2;
    const bool composes = *next++ % 2 != 0;
    decompositions_.emplace(c, Decomposition{next, count});
    if (composes) {
      compositions_.emplace(pair_of(next[0], next[1]), c);
      never(next[1], Classes::begins);
    } else {
      never(c, Classes::stays);
    }
    decomposed.push_back(c);
    next += count;
  }
  std::vector<Part> parts;
  for (const char32_t c : decomposed) {
    parts.clear();
    decompose(c, parts);
    if ((classes_[parts.front().c] & Classes::begins) == 0) never(c, Classes::begins);
  }
}

char Unicode::contraction_letter(char32_t c) noexcept {
  for (std::size_t i = 0; i < contraction_letters.size; i += 2) {
    if (contraction_letters.data[i] == c) return static_cast<char>(contraction_letters.data[i + 1]);
  }
  return 0;
}

std::uint8_t Unicode::rank(char32_t c) const {
  const auto found = ranks_.find(c);
  return found == ranks_.end() ? std::uint8_t{0} : found->second;
}

void Unicode::decompose(char32_t c, std::vector<Part>& parts) const {
  if (c - first_syllable < syllables) {
    const char32_t index = c - first_syllable;
    parts.push_back({first_leading + index / (vowels * trailings), 0});
    parts.push_back({first_vowel + index / trailings % vowels, 0});
    if (index % trailings != 0) parts.push_back({before_trailing + index % trailings, 0});
    return;
  }
  // Only the first part may decompose further, so the parts are found from the last to the first.
  const auto before = static_cast<std::ptrdiff_t>(parts.size());
  for (auto found = decompositions_.find(c); found != decompositions_.end();
       found = decompositions_.find(c)) {
    const auto [given, count] = found->second;
    for (std::size_t i = count - 1; i > 0; --i) parts.push_back({given[i], rank(given[i])});
    c = given[0];
  }
  parts.push_back({c, rank(c)});
  std::reverse(parts.begin() + before, parts.end());
}

char32_t Unicode::composed(char32_t first, char32_t second) const {
  if (first - first_leading < leadings && second - first_vowel < vowels) {
    return first_syllable + ((first - first_leading) * vowels + (second - first_vowel)) * trailings;
  }
  if (first - first_syllable < syllables && (first - first_syllable) % trailings == 0 &&
      second > before_trailing && second < before_trailing + trailings) {
    return first + (second - before_trailing);
  }
  const auto found = compositions_.find(pair_of(first, second));
  return found == compositions_.end() ? 0 : found->second;
}

void Unicode::compose(std::vector<Part>& parts, std::string& to) const {
  for (std::size_t i = 0; i < parts.size(); ++i) parts[i].place = i;
  for (auto mark = parts.begin(); mark != parts.end();) {
    if (mark->rank == 0) {
      ++mark;
      continue;
    }
    const auto end = std::find_if(mark, parts.end(), [](const Part& part) { return part.rank == 0; });
    std::sort(mark, end, [](const Part& a, const Part& b) {
      return std::pair(a.rank, a.place) < std::pair(b.rank, b.place);
    });
    mark = end;
  }
  std::size_t kept = 0;
  std::size_t starter = parts.size();  // none yet
  for (const Part part : parts) {
    const bool blocked = starter == parts.size() || (kept > starter + 1 && parts[kept - 1].rank >= part.rank);
    const char32_t both = blocked ? 0 : composed(parts[starter].c, part.c);
    if (both != 0) {
      parts[starter].c = both;
      continue;
    }
    if (part.rank == 0) starter = kept;
    parts[kept++] = part;
  }
  for (std::size_t i = 0; i < kept; ++i) append_utf8(parts[i].c, to);
}

bool Unicode::is_plain(std::string_view text) const noexcept {
  constexpr unsigned plain = Classes::begins | Classes::stays;
  for (std::size_t at = 0; at < text.size();) {
    const Character one = character_at(text, at);
    if ((classes(one.c) & plain) != plain) return false;
    at += one.size;
  }
  return true;
}

std::string Unicode::nfc(std::string_view text) const {
  std::string result;
  result.reserve(text.size());
  std::vector<Part> parts;
  for (std::size_t at = 0; at < text.size();) {
    // A character and all that may join it: up to the next one that begins.
    const Character first = character_at(text, at);
    std::size_t end = at + first.size;
    Character next = character_at(text, end);
    if ((next.size == 0 || (classes(next.c) & Classes::begins) != 0) &&
        (classes(first.c) & Classes::stays) != 0) {
      result.append(text, at, first.size);
      at = end;
      continue;
    }
    parts.clear();
    decompose(first.c, parts);
    while (next.size != 0 && (classes(next.c) & Classes::begins) == 0) {
      decompose(next.c, parts);
      end += next.size;
      next = character_at(text, end);
    }
    compose(parts, result);
    at = end;
  }
  return result;
}

Character character_before(std::string_view text, std::size_t end) noexcept {
  std::size_t start = end - 1;
  while ((static_cast<unsigned char>(text[start]) & 0xC0U) == 0x80U) --start;
  return character_at(text, start);
}

void append_utf8(char32_t c, std::string& to) {
  const auto put = [&to](char32_t byte) { to += static_cast<char>(byte); };
  const auto rest = [&](unsigned shift) { put(0x80U | (c >> shift & 0x3FU)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xC0U | c >> 6U);
    rest(0);
  } else if (c < 0x10000) {
    put(0xE0U | c >> 12U);
    rest(6);
    rest(0);
  } else {
    put(0xF0U | c >> 18U);
    rest(12);
    rest(6);
    rest(0);
  }
}

namespace {

struct Bytes {
  std::size_t size;  // of the character, or of what is invalid
  std::size_t full;  // the bytes of the whole character; 0 if what is there is invalid
};

/// The bytes at a place that are one character, or the beginning of one, or neither (The Unicode Standard, table 3-7).
Bytes bytes_at(std::string_view bytes, std::size_t at) noexcept {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(bytes[at + i]); };
  const unsigned first = byte(0);
  if (first < 0x80) return {1, 1};
  if (first < 0xC2 || first > 0xF4) return {1, 0};
  std::size_t full = 4;
  if (first < 0xF0) full = first < 0xE0 ? 2 : 3;
  unsigned least = 0x80;  // of the second byte
  unsigned most = 0xBF;
  if (first == 0xE0) least = 0xA0;
  if (first == 0xED) most = 0x9F;
  if (first == 0xF0) least = 0x90;
  if (first == 0xF4) most = 0x8F;
  const std::size_t there = std::min(full, bytes.size() - at);
  for (std::size_t i = 1; i < there; ++i) {
    if (byte(i) < (i == 1 ? least : 0x80) || byte(i) > (i == 1 ? most : 0xBF)) return {i, 0};
  }
  return {there, full};
}

}  // namespace

std::size_t append_valid(std::string_view bytes, bool whole, std::string& to) {
  std::size_t at = 0;
  while (at < bytes.size()) {
    const Bytes one = bytes_at(bytes, at);
    if (one.size == one.full) {
      to.append(bytes, at, one.size);
    } else if (one.full != 0 && !whole) {
      break;
    } else {
      append_utf8(0xFFFD, to);
    }
    at += one.size;
  }
  return at;
}

bool is_valid_utf8(std::string_view bytes) noexcept {
  for (std::size_t at = 0; at < bytes.size();) {
    const Bytes one = bytes_at(bytes, at);
    if (one.size != one.full) return false;
    at += one.size;
  }
  return true;
}

std::string valid_utf8(std::string bytes) {
  if (is_valid_utf8(bytes)) return bytes;
  std::string text;
  append_valid(bytes, /*whole=*/true, text);
  return text;
}

}  // namespace qwenport::detail
