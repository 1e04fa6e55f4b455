// Requests whose length scales queries and keys (dual chunk attention): the counterpart of engines/length_scale.py.
//
// A prompt's keys all have the factor of its full length; each decoded token's key has that of the length it makes. So a
// prompt cannot continue keys with another factor.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "qwenport/qwenport.hpp"

namespace qwenport::detail {

/// The request lengths of the keys in a cache.
class LengthScale {
 public:
  using Lengths = std::vector<std::vector<std::int64_t>>;

  /// \param unscaled requests of at most so many positions are not scaled: they count as such a one.
  LengthScale(std::int64_t unscaled, std::size_t rows, std::size_t capacity)
      : unscaled_(unscaled), held_(rows) {
    for (auto& row : held_) row.reserve(capacity);
  }

  /// How many of a row's first keys have the factor of a request of so many positions.
  [[nodiscard]] std::size_t reusable(std::size_t row, std::int64_t request) const {
    return static_cast<std::size_t>(first_other(row, request) - held_[row].begin());
  }

  /// \throws Error invalid_argument: a row that is to be given a prompt holds keys with another factor.
  void check(std::size_t row, std::int64_t request) const {
    const auto other = first_other(row, request);
    if (other != held_[row].end()) refuse(row, *other, request);
  }
  /// \throws Error invalid_argument: a row that is to be given a token was cut within a prompt, whose keys have the factor
  ///   of all of it.
  void check_decode(std::size_t row, std::int64_t request) const {
    if (held_[row].empty()) return;
    const std::int64_t last = held_[row].back();  // the largest
    if (last > std::max(request, unscaled_)) refuse(row, last, request);
  }

  /// What a step is fed for a row. \param replays it writes the row's last key again, and no other.
  [[nodiscard]] std::int64_t of_step(std::size_t row, std::int64_t request, bool replays) const {
    return replays ? held_[row].back() : std::max(request, unscaled_);
  }

  /// Count keys that a step has written.
  void hold(std::size_t row, std::int64_t request, std::size_t count) {
    held_[row].insert(held_[row].end(), count, std::max(request, unscaled_));
  }
  void truncate(std::size_t row, std::size_t length) { held_[row].resize(length); }

  /// Whether a snapshot's length can be one. \param positions those of the model.
  [[nodiscard]] bool is_possible(std::int64_t length, std::int64_t positions) const {
    return length >= unscaled_ && length <= std::max(unscaled_, positions);
  }
  [[nodiscard]] const Lengths& held() const noexcept { return held_; }
  void restore(Lengths held) { held_ = std::move(held); }

 private:
  [[noreturn]] void refuse(std::size_t row, std::int64_t held, std::int64_t request) const {
    const std::string scaled = held > unscaled_
                                   ? "scaled for a request of " + std::to_string(held) + " positions"
                                   : std::string("not scaled");
    throw Error(ErrorCode::invalid_argument, "row " + std::to_string(row) + " holds keys that are " + scaled +
                                                 ", and this request has " + std::to_string(request) +
                                                 ": lengths beyond " + std::to_string(unscaled_) +
                                                 " scale keys; reset the row and give it the whole prompt");
  }

  [[nodiscard]] std::vector<std::int64_t>::const_iterator first_other(std::size_t row,
                                                                      std::int64_t request) const {
    const std::int64_t length = std::max(request, unscaled_);
    return std::find_if(held_[row].begin(), held_[row].end(),
                        [length](std::int64_t one) { return one != length; });
  }

  std::int64_t unscaled_;
  Lengths held_;
};

}  // namespace qwenport::detail
