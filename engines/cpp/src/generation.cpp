#include "generation.hpp"

#include <algorithm>
#include <string>

#include "sampling.hpp"

namespace qwenport::detail {
namespace {

/// Cache slots that a row's prompt may take.
std::size_t free_slots(const SessionCore& session, const GenerateOptions& options, std::size_t row) {
  return static_cast<std::size_t>(session.capacity() - (options.append ? session.length(row) : 0));
}

/// One row of the batch: its sampler, the tokens it has seen and what it may still generate.
class Row {
 public:
  Row(int index, TokenView given, const SamplingParams& params, const GenerateOptions& options,
      const SessionCore& session)
      : prompt(given),
        index_(index),
        stop_tokens_(options.stop_tokens),
        sampler_(params, options.seed, static_cast<std::uint64_t>(index),
                 session.manifest().info.vocab_size) {
    const auto room = free_slots(session, options, static_cast<std::size_t>(index)) - prompt.size + 1;
    const auto most = static_cast<std::size_t>(options.max_new_tokens);
    limit_ = std::min(room, most);
    result.reason = most <= room ? FinishReason::length : FinishReason::capacity;
    result.tokens.reserve(limit_);
    seen_.reserve(prompt.size + limit_);
    seen_.assign(prompt.data, prompt.data + prompt.size);
  }

  /// Draw the next token from the logits and decide whether the row ends.
  void take(const float* logits, const OnToken& on_token) {
    const Token token = draw(logits);
    if (std::find(stop_tokens_.begin(), stop_tokens_.end(), token) != stop_tokens_.end()) {
      result.reason = FinishReason::stop;
      result.stop_token = token;
      ended = true;
      return;
    }
    result.tokens.push_back(token);
    seen_.push_back(token);
    ended = result.tokens.size() == limit_;
    if (on_token) on_token(index_, token);
  }

  /// The row's prompt, new tokens and stop token, without the first `fed`.
  [[nodiscard]] std::vector<Token> beyond(std::size_t fed) const {
    std::vector<Token> rest(seen_.begin() + static_cast<std::ptrdiff_t>(fed), seen_.end());
    if (result.reason == FinishReason::stop) rest.push_back(result.stop_token);
    return rest;
  }

  TokenView prompt;
  Generated result;
  bool ended = false;

 private:
  Token draw(const float* logits) {
    try {
      return sampler_.sample(logits, seen_);
    } catch (const Error& error) {
      throw Error(error.code(), "row " + std::to_string(index_) + ", new token " +
                                    std::to_string(result.tokens.size()) + ": " + error.what());
    }
  }

  int index_;
  const std::vector<Token>& stop_tokens_;
  Sampler sampler_;
  std::vector<Token> seen_;
  std::size_t limit_ = 0;
};

void check(const SessionCore& session, const std::vector<TokenView>& prompts,
           const GenerateOptions& options) {
  const auto invalid = [](const std::string& message) { throw Error(ErrorCode::invalid_argument, message); };
  if (prompts.size() > static_cast<std::size_t>(session.max_batch())) {
    invalid(std::to_string(prompts.size()) + " prompts, but the session has " +
            std::to_string(session.max_batch()) + " rows");
  }
  if (options.max_new_tokens < 1) invalid("max_new_tokens must be at least 1");
  for (const Token token : options.stop_tokens) {
    if (token < 0) invalid("a stop token must be at least 0, got " + std::to_string(token));
  }
  const int vocab = session.manifest().info.vocab_size;
  for (std::size_t b = 0; b < prompts.size(); ++b) {
    const TokenView& prompt = prompts[b];
    if (prompt.size == 0)
      invalid("prompt " + std::to_string(b) + " is empty: a model needs at least one token");
    for (std::size_t i = 0; i < prompt.size; ++i) {
      if (prompt.data[i] < 0 || prompt.data[i] >= vocab) {
        invalid("an id of prompt " + std::to_string(b) + " must be in [0, " + std::to_string(vocab) +
                "), got " + std::to_string(prompt.data[i]));
      }
    }
    const std::size_t room = free_slots(session, options, b);
    if (prompt.size > room) {
      throw Error(ErrorCode::capacity, "prompt " + std::to_string(b) + " has " + std::to_string(prompt.size) +
                                           " tokens, the session has room for " + std::to_string(room));
    }
  }
}

}  // namespace

std::vector<Generated> generate(SessionCore& session, const std::vector<TokenView>& prompts,
                                const GenerateOptions& options, const OnToken& on_token) {
  const SamplingParams params = checked_params(options);
  check(session, prompts, options);
  const auto cancelled = [&options] {
    return options.cancellation != nullptr && options.cancellation->requested();
  };
  if (!options.append) session.reset();
  std::vector<Row> rows;
  std::vector<int> before;
  std::size_t longest = 0;
  rows.reserve(prompts.size());
  before.reserve(prompts.size());
  for (const TokenView& prompt : prompts) {
    before.push_back(session.length(rows.size()));
    rows.emplace_back(static_cast<int>(rows.size()), prompt, params, options, session);
    longest = std::max(longest, prompt.size);
  }
  const auto chunk = static_cast<std::size_t>(session.max_step_tokens());
  std::vector<TokenView> fed(rows.size());
  std::vector<Token> tokens(rows.size());
  bool stopped = false;
  for (std::size_t start = 0; start < longest && !(stopped = cancelled()); start += chunk) {
    for (std::size_t b = 0; b < rows.size(); ++b) {
      const TokenView& prompt = rows[b].prompt;
      const std::size_t begin = std::min(start, prompt.size);
      fed[b] = {prompt.data + begin, std::min(chunk, prompt.size - begin)};
    }
    const Logits logits = session.prefill(fed.data(), fed.size());
    for (std::size_t b = 0; b < rows.size(); ++b) {
      const std::size_t size = rows[b].prompt.size;
      if (start < size && size <= start + chunk) rows[b].take(logits.row(static_cast<int>(b)), on_token);
    }
  }
  const auto unfinished = [&rows] {
    return std::any_of(rows.begin(), rows.end(), [](const Row& row) { return !row.ended; });
  };
  while (!stopped && unfinished() && !(stopped = cancelled())) {
    for (std::size_t b = 0; b < rows.size(); ++b) {
      fed[b] = {};
      if (rows[b].ended) continue;
      tokens[b] = rows[b].result.tokens.back();
      fed[b] = {&tokens[b], 1};
    }
    const Logits logits = session.prefill(fed.data(), fed.size());
    for (std::size_t b = 0; b < rows.size(); ++b) {
      if (fed[b].size != 0) rows[b].take(logits.row(static_cast<int>(b)), on_token);
    }
  }
  std::vector<Generated> results;
  results.reserve(rows.size());
  for (std::size_t b = 0; b < rows.size(); ++b) {
    Row& row = rows[b];
    if (!row.ended) row.result.reason = FinishReason::cancelled;
    row.result.pending = row.beyond(static_cast<std::size_t>(session.length(b) - before[b]));
    results.push_back(std::move(row.result));
  }
  return results;
}

}  // namespace qwenport::detail
