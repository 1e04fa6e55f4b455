// Ending a row at a sequence of tokens: the counterpart of engines/stop_sequences.py.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "qwenport/qwenport.hpp"

namespace qwenport::detail {

/// The stop sequences of one row, none empty, and how much of each its new tokens end with. Each is matched with the
/// failure function of Knuth, Morris and Pratt (1977).
class StopSequences {
 public:
  /// \param sequences must outlive this.
  explicit StopSequences(const std::vector<std::vector<Token>>& sequences)
      : sequences_(sequences), matched_(sequences.size()) {
    failures_.reserve(sequences.size());
    for (const std::vector<Token>& sequence : sequences) failures_.push_back(failure(sequence));
  }

  /// Append a new token; the row ends with the first that completes a sequence.
  /// Returns the index of the sequence that the new tokens end with, of several the longest, of equal ones the first;
  /// -1 if there is none.
  int push(Token token) {
    int complete = -1;
    for (std::size_t i = 0; i < sequences_.size(); ++i) {
      matched_[i] = advance(sequences_[i], failures_[i], matched_[i], token);
      if (matched_[i] == sequences_[i].size() && (complete < 0 || matched_[i] > size(complete))) {
        complete = static_cast<int>(i);
      }
    }
    return complete;
  }

  /// The tokens of a sequence; 0 for -1.
  [[nodiscard]] std::size_t size(int sequence) const {
    return sequence < 0 ? 0 : sequences_[static_cast<std::size_t>(sequence)].size();
  }

  /// How many of the last new tokens may be the beginning of a sequence.
  [[nodiscard]] std::size_t undecided() const {
    return matched_.empty() ? 0 : *std::max_element(matched_.begin(), matched_.end());
  }

 private:
  using Lengths = std::vector<std::size_t>;

  static std::size_t advance(const std::vector<Token>& sequence, const Lengths& failure, std::size_t matched,
                             Token token) {
    while (matched != 0 && sequence[matched] != token) matched = failure[matched - 1];
    return sequence[matched] == token ? matched + 1 : 0;
  }

  /// For each prefix, the length of the longest shorter prefix that it ends with.
  static Lengths failure(const std::vector<Token>& sequence) {
    Lengths lengths(sequence.size());
    for (std::size_t i = 1; i < sequence.size(); ++i) {
      lengths[i] = advance(sequence, lengths, lengths[i - 1], sequence[i]);
    }
    return lengths;
  }

  const std::vector<std::vector<Token>>& sequences_;
  std::vector<Lengths> failures_;
  Lengths matched_;
};

}  // namespace qwenport::detail
