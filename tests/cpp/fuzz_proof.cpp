// Whatever a proof's bytes are, reading it ends in cases that a session can run or in a bad_engine error.
// The input is the header, a line feed and the values: the length of the header is added, so that it always fits.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>

#include "proof.hpp"

namespace {

constexpr int vocab = 97;

void expect(bool holds) {
  if (!holds) std::abort();
}

void read(const std::string& file) {
  try {
    const qwenport::detail::Proof proof(file, "fuzz", vocab);
    expect(!proof.cases().empty());
    const std::vector<float> logits(vocab, 1);
    for (const auto& one : proof.cases()) {
      std::map<int, int> held;
      for (const auto& step : one.steps) {
        if (step.kind == qwenport::detail::ProofStep::Kind::reset) held.clear();
        for (const auto& feed : step.feeds) {
          held[feed.row] += static_cast<int>(feed.count);
          expect(feed.row >= 0 && feed.row < one.rows && feed.count >= 1);
          expect(held[feed.row] == feed.end && feed.end <= one.slots);
          for (std::size_t i = 0; i < feed.count; ++i) expect(feed.tokens[i] >= 0 && feed.tokens[i] < vocab);
          if (feed.mark != nullptr) expect(!std::isnan(proof.error(*feed.mark, logits.data())));
        }
        if (step.kind == qwenport::detail::ProofStep::Kind::truncate) {
          expect(step.length <= held[step.row]);
          held[step.row] = step.length;
        }
      }
    }
  } catch (const qwenport::Error& error) {
    expect(error.code() == qwenport::ErrorCode::bad_engine);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  read(text);
  const std::size_t end = std::min(text.find('\n'), text.size());
  const std::uint64_t length = end;
  std::string file(sizeof length, 0);
  std::memcpy(file.data(), &length, sizeof length);
  read(file + text.substr(0, end) + text.substr(std::min(end + 1, text.size())));
  return 0;
}
