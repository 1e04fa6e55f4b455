// The active spans of a cache: the rule of engines/spans.py.
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

}  // namespace qwenport::detail
