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

/// Whether a step's scores take at most `most_bytes`. \param score_bytes of a token and a slot of its span.
constexpr bool scores_fit(std::int64_t rows, std::int64_t width, std::int64_t span, std::int64_t score_bytes,
                          std::int64_t most_bytes) {
  return score_bytes == 0 || width <= most_bytes / (rows * span * score_bytes);
}

}  // namespace qwenport::detail
