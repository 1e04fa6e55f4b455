// Parts of the runtime as C functions, for the tests that hold them against Python: sampling, SHA-256, the
// manifest. Beside them the toy network's definition, as the reference for whole sessions.
#include <cstdint>
#include <cstring>
#include <vector>

#include "files.hpp"
#include "qwenport/export.h"
#include "sampling.hpp"
#include "sha256.hpp"
#include "spans.hpp"
#include "stand_in.hpp"
#include "target.hpp"

namespace {

using qwenport::detail::Manifest;

/// Run something; its error's code, and its text into `message` [1024].
template <typename Work>
int guarded(char* message, const Work& work) {
  try {
    work();
    return 0;
  } catch (const qwenport::Error& error) {
    std::strncpy(message, error.what(), 1023);
    return static_cast<int>(error.code());
  }
}

}  // namespace

extern "C" {

/// Draw `draws` tokens from the same logits with one sampler; `seen` stays what it is. `total` is the sum of the
/// weights that they were drawn from.
QWENPORT_EXPORT int test_sample(const float* logits, int vocab, const std::int64_t* seen,
                                std::size_t seen_count, const double* temperature_p_penalty,
                                std::int64_t top_k, std::uint64_t seed, std::uint64_t row, std::size_t draws,
                                std::int64_t* tokens, double* total, char* message) {
  return guarded(message, [&] {
    qwenport::GenerateOptions options;
    options.temperature = temperature_p_penalty[0];
    options.top_p = temperature_p_penalty[1];
    options.repetition_penalty = temperature_p_penalty[2];
    options.top_k = top_k;
    qwenport::detail::Sampler sampler(qwenport::detail::checked_params(options), seed, row, vocab);
    const std::vector<std::int64_t> history(seen, seen + seen_count);
    for (std::size_t i = 0; i < draws; ++i) tokens[i] = sampler.sample(logits, history);
    *total = sampler.total_weight();
  });
}

/// log_softmax: of one token, and of the `count` most likely ones.
QWENPORT_EXPORT void test_log_probabilities(const float* logits, std::size_t vocab, qwenport::Token token,
                                            std::size_t count, float* drawn, std::int64_t* top_tokens,
                                            float* top_logprobs) {
  const qwenport::detail::LogProbabilities all(logits, vocab);
  *drawn = all.of(token);
  for (const auto& [likely, logprob] : all.top(count)) {
    *top_tokens++ = likely;
    *top_logprobs++ = logprob;
  }
}

/// The SHA-256 of data, fed in two parts.
QWENPORT_EXPORT void test_sha256(const char* data, std::size_t bytes, std::size_t first, int hardware,
                                 char* hex) {
  qwenport::detail::Sha256 hash(hardware != 0);
  hash.update(data, first);
  hash.update(data + first, bytes - first);
  std::memcpy(hex, hash.hex().data(), 64);
}

/// Parse a manifest and hold it against what a machine has; an empty text skips that check.
QWENPORT_EXPORT int test_manifest(const char* text, std::size_t bytes, const char* flavour,
                                  const char* version, const char* gpu, qwenport::Token* numbers,
                                  char* message) {
  return guarded(message, [&] {
    const Manifest manifest = qwenport::detail::parse_manifest({text, bytes}, "here/qwenport.json");
    if (*flavour != 0) qwenport::detail::check_flavour(manifest, "here", {flavour});
    if (*version != 0) qwenport::detail::check_version(manifest, "here", version);
    if (*gpu != 0) qwenport::detail::check_gpu(manifest, "here", gpu);
    const auto& info = manifest.info;
    const std::int64_t found[] = {info.vocab_size,
                                  info.capacity,
                                  info.max_batch,
                                  info.max_step_tokens,
                                  static_cast<std::int64_t>(manifest.caches.size()),
                                  static_cast<std::int64_t>(info.cache_bytes_per_row),
                                  static_cast<std::int64_t>(manifest.model.bytes)};
    std::memcpy(numbers, found, sizeof found);
  });
}

/// Hold the plan and the plugins of an engine directory against its manifest.
QWENPORT_EXPORT int test_files(const char* directory, char* message) {
  return guarded(message, [&] {
    const Manifest manifest = qwenport::detail::read_manifest(directory);
    std::vector<qwenport::detail::FileRecord> files = manifest.plugins;
    files.push_back(manifest.model);
    for (const auto& file : files) {
      qwenport::detail::check_file(file, directory,
                                   qwenport::detail::MappedFile(std::string(directory) + "/" + file.name));
    }
  });
}

/// The active span of a step that needs `count` slots.
QWENPORT_EXPORT std::int64_t test_span_holding(std::int64_t count, std::int64_t multiple,
                                               std::int64_t slots) {
  return qwenport::detail::span_holding(count, multiple, slots);
}

/// Whether the scores of a step take at most `most_bytes`.
QWENPORT_EXPORT bool test_scores_fit(std::int64_t rows, std::int64_t width, std::int64_t span,
                                     std::int64_t score_bytes, std::int64_t most_bytes) {
  return qwenport::detail::scores_fit(rows, width, span, score_bytes, most_bytes);
}

/// The largest span of at most `most` slots.
QWENPORT_EXPORT std::int64_t test_span_within(std::int64_t most, std::int64_t multiple, std::int64_t slots) {
  return qwenport::detail::span_within(most, multiple, slots);
}

/// The text of the toy network's manifest.
QWENPORT_EXPORT const char* test_toy_manifest(int capacity, int max_batch, int max_step_tokens, int vocab) {
  static thread_local std::string text;
  text = stand_in::toy_manifest_text(capacity, max_batch, max_step_tokens, vocab);
  return text.c_str();
}

/// The logits [vocab] that the toy network of a manifest has after these tokens.
QWENPORT_EXPORT void test_toy_logits(const char* manifest, const std::int64_t* tokens, std::size_t count,
                                     float* logits) {
  const auto expected =
      stand_in::toy_logits(qwenport::detail::parse_manifest(manifest, "toy"), {tokens, tokens + count});
  std::memcpy(logits, expected.data(), expected.size() * sizeof(float));
}

}  // extern "C"
