// The memory of self-tests that passed: one small file each in the user's cache directory, shared with Python
// (docs/reference/proof.md).
#pragma once

#include <array>
#include <string>

namespace qwenport::detail {

/// What a self-test passed on: the format, the engine, the device, its driver, the runtime.
using PassKey = std::array<std::string, 5>;

/// What a pass says.
struct Pass {
  int cases = 0;  ///< that ran
  int left_out = 0;
  int marks = 0;  ///< rows of logits that were compared
};

/// The file of a pass; empty if the environment names no place for it.
std::string pass_file(const PassKey& key);

[[nodiscard]] bool is_remembered(const PassKey& key);

/// False if it cannot be written.
bool remember(const PassKey& key, const Pass& pass);

void forget(const PassKey& key);

}  // namespace qwenport::detail
