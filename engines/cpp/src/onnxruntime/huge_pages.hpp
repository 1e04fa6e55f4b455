// Huge pages for the weights that onnxruntime packs when it loads an engine: a decode step reads every weight once, and
// with pages of 4 KiB and weights of a few bits the processor waits for its page tables as well as for memory.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace qwenport::detail {

/// Addresses from the first up to the second.
using AddressRange = std::pair<std::uintptr_t, std::uintptr_t>;

/// The parts of `ranges` that are in none of `others`. Both are in order.
std::vector<AddressRange> without(const std::vector<AddressRange>& ranges,
                                  const std::vector<AddressRange>& others);

/// Moves memory into huge pages that the process has allocated, and written to, since this was made.
class HugePages {
 public:
  HugePages();

  /// Nothing happens where the system has no huge pages, has them switched off, or is short of them.
  void move_new_memory() const;

 private:
  bool are_allowed_;
  std::vector<AddressRange> before_;
};

}  // namespace qwenport::detail
