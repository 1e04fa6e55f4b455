// The active spans of a cache: the rule of engines/spans.py. How wide a step over one may be: that of engines/session.py.
#pragma once

#include <algorithm>
#include <cstdint>

namespace qwenport::detail {

/// The smallest span of at least `count` slots. Spans are multiples of the first, each an eighth larger than the
/// last, then all `slots` of the cache.
constexpr std::int64_t span_holding(std::int64_t count, std::int64_t multiple, std::int64_t slots) {
  std::int64_t span = multiple;
  while (span < count && span < slots) {
    span = std::max(span + multiple, (9 * span + 8 * multiple - 1) / (8 * multiple) * multiple);
  }
  return std::min(span, slots);
}

/// The largest span of at most `most` slots; 0: there is none.
constexpr std::int64_t span_within(std::int64_t most, std::int64_t multiple, std::int64_t slots) {
  std::int64_t span = 0;
  for (std::int64_t next = span_holding(1, multiple, slots); next <= most && next != span;
       next = span_holding(span + 1, multiple, slots)) {
    span = next;
  }
  return span;
}

/// The most tokens per row, up to `width`, of a step from slot `start` on whose scores take at most `most_bytes`; at least 1.
/// \param score_bytes of a token and a slot of its span; 0: all fit.
constexpr std::int64_t narrowed(std::int64_t rows, std::int64_t start, std::int64_t width,
                                std::int64_t score_bytes, std::int64_t most_bytes, std::int64_t multiple,
                                std::int64_t slots) {
  if (score_bytes == 0) return width;
  while (width > 1 &&
         width > most_bytes / (rows * span_holding(start + width, multiple, slots) * score_bytes)) {
    width = (width + 1) / 2;
  }
  return width;
}

}  // namespace qwenport::detail
