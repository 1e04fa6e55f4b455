// Writes proof.safetensors for the tests, from its definition in docs/reference/proof.md.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace stand_in {

struct Fed {
  int row;
  int sequence;
  int end;
};

class ProofFile {
 public:
  std::vector<std::vector<std::int64_t>> sequences;
  std::vector<float> bounds{1e-6F, 1e-6F, 1e-6F};  // of every mark
  std::string dtype = "fp32";
  std::string package_sha256 = std::string(64, 'a');

  void begin(const std::string& name, int rows, int slots);
  void feed(const std::vector<Fed>& rows);  // each end gets a mark
  void truncate(int row, int length);
  void poison();
  void reset();

  /// \param logits of some tokens, fp32 [vocab].
  [[nodiscard]] std::string bytes(
      const std::function<std::vector<float>(const std::vector<std::int64_t>&)>& logits) const;

 private:
  void add(int kind, int row, int sequence, int end);

  std::vector<std::string> cases_;
  std::vector<std::pair<int, int>> marks_;
  std::vector<std::int32_t> operations_;
  int call_ = -1;
};

}  // namespace stand_in
