// An engine's proof.safetensors: what the judged package computes after some texts, and the calls in which a session is to
// reproduce that. Format and rules are those of docs/reference/proof.md; every offset, shape, dtype and range is checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "qwenport/qwenport.hpp"

namespace qwenport::detail {

/// The fingerprint of a row of logits.
struct Mark {
  const std::int32_t* top_ids = nullptr;  ///< [Proof::top], of the largest logits
  const float* top_values = nullptr;      ///< [Proof::top]
  const float* projections = nullptr;     ///< [64]
  double norm = 0;                        ///< L2
  /// Of an engine that computes in fp32, of one in the package's dtype, and of one in fp32 that rounds activations
  /// where it multiplies by quantized weights.
  double bounds[3] = {0, 0, 0};
};

/// Tokens for a row, after those that it holds.
struct ProofFeed {
  int row = 0;
  int end = 0;  ///< tokens that the row then holds
  const std::int32_t* tokens = nullptr;
  std::size_t count = 0;       ///< at least 1
  const Mark* mark = nullptr;  ///< of the last one's logits; nullptr: they are not judged
};

struct ProofStep {
  enum class Kind { feed, truncate, poison, reset };
  Kind kind = Kind::reset;
  int call = 0;                  ///< counts over all cases
  std::vector<ProofFeed> feeds;  ///< feed: one call, of rising rows
  int row = 0;                   ///< truncate
  int length = 0;                ///< truncate
};

/// Steps of a session that is empty at first.
struct ProofCase {
  std::string name;
  int rows = 0;   ///< that a session must have
  int slots = 0;  ///< of each row
  std::vector<ProofStep> steps;
};

class Proof {
 public:
  /// \param file the content. \param where its path, for messages. \param vocab_size the engine's.
  /// \throws Error bad_engine.
  Proof(std::string_view file, const std::string& where, int vocab_size);
  Proof(const Proof&) = delete;  // marks and feeds point into its own memory
  Proof& operator=(const Proof&) = delete;
  ~Proof() = default;

  [[nodiscard]] const std::string& package_sha256() const noexcept { return package_sha256_; }
  /// The package's.
  [[nodiscard]] const std::string& dtype() const noexcept { return dtype_; }
  [[nodiscard]] const std::vector<ProofCase>& cases() const noexcept { return cases_; }

  /// The error of a row of logits, fp32 [vocab_size], relative to the norm; infinity if one is not finite.
  [[nodiscard]] double error(const Mark& mark, const float* logits) const;

 private:
  std::size_t vocab_size_;
  std::size_t top_;
  std::string package_sha256_;
  std::string dtype_;
  std::vector<std::int32_t> tokens_;
  std::vector<std::int32_t> top_ids_;
  std::vector<float> top_values_;
  std::vector<float> projections_;
  std::vector<Mark> marks_;
  std::vector<ProofCase> cases_;
};

}  // namespace qwenport::detail
