// Choosing the next token from a row of logits, with the bits of the Python sampler.
//
// engines/sampling.py is the specification, down to the order of operations: transformers' processors
// (repetition penalty, temperature, top-k, top-p), then one draw of xoshiro256**. It holds only if no
// product and sum are contracted into an FMA: this file is compiled with -ffp-contract=off.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "qwenport/qwenport.hpp"

namespace qwenport::detail {

struct SamplingParams {
  double temperature = 0;
  std::int64_t top_k = 0;
  double top_p = 1;
  double repetition_penalty = 1;

  [[nodiscard]] bool greedy() const noexcept { return temperature == 0; }
};

/// The sampling part of the options. \throws Error invalid_argument: a value is outside its range.
SamplingParams checked_params(const GenerateOptions& options);

/// Whether a token can be chosen from the logits; `edited` are those after on_logits.
/// \throws Error sampling: NaN, +inf, all -inf.
void check_logits(const float* logits, std::size_t vocab_size, bool edited);

/// log_softmax of one row of logits, from which a token can be chosen: log_probabilities of engines/sampling.py.
class LogProbabilities {
 public:
  LogProbabilities(const float* logits, std::size_t vocab_size);
  [[nodiscard]] float of(Token token) const noexcept;
  /// The `count` most likely tokens, highest first, equal ones by ascending id.
  [[nodiscard]] std::vector<TokenLogprob> top(std::size_t count) const;

 private:
  const float* logits_;
  std::size_t vocab_;
  double highest_;
  double log_total_ = 0;
};

/// xoshiro256** 1.0, on the stream of (seed, row).
class Random {
 public:
  Random(std::uint64_t seed, std::uint64_t row) noexcept;
  /// A double in [0, 1): the upper 53 bits of the next word times 2^-53.
  double uniform() noexcept;

 private:
  std::array<std::uint64_t, 4> state_{};
};

/// Token sampling for one row of one request. Its memory is allocated on construction.
class Sampler {
 public:
  Sampler(const SamplingParams& params, std::uint64_t seed, std::uint64_t row, int vocab_size);

  /// The next token.
  /// \param logits fp32 [vocab_size]. \param seen the tokens that the penalty applies to.
  /// \throws Error sampling: NaN, +inf, all -inf.
  Token sample(const float* logits, const std::vector<Token>& seen);
  /// The sum of the weights that the last token was drawn from: it depends on all their bits, for the tests.
  [[nodiscard]] double total_weight() const noexcept { return total_; }

 private:
  void penalise(const float* logits, const std::vector<Token>& seen);
  void keep_top_k();
  void keep_top_p(float top);
  std::size_t weigh(float top);

  SamplingParams params_;
  Random random_;
  std::size_t vocab_;
  double total_ = 0;
  std::vector<float> scores_;
  std::vector<std::uint32_t> kept_;   // ids of the scores above -inf, ascending
  std::vector<double> weights_;       // theirs
  std::vector<std::uint32_t> order_;  // scratch of top-p
  std::vector<float> highest_;        // scratch of top-k
};

}  // namespace qwenport::detail
