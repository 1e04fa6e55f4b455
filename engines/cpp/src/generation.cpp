#include "generation.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "sampling.hpp"
#include "stop_sequences.hpp"

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
        options_(options),
        session_(session),
        vocab_(static_cast<std::size_t>(session.manifest().info.vocab_size)),
        sampler_(params, options.seed, static_cast<std::uint64_t>(index), session.manifest().info.vocab_size),
        matching_(options.stop_sequences) {
    const auto room = free_slots(session, options, static_cast<std::size_t>(index)) - prompt.size + 1;
    const auto most = static_cast<std::size_t>(options.max_new_tokens);
    limit_ = std::min(room, most);
    result.reason = most <= room ? FinishReason::length : FinishReason::capacity;
    drawn_.reserve(limit_);
    seen_.reserve(prompt.size + limit_);
    seen_.assign(prompt.data, prompt.data + prompt.size);
    if (options.on_logits) edited_.resize(vocab_);
    if (options.logprobs >= 0) result.logprobs.reserve(limit_);
    if (options.logprobs > 0) result.top_logprobs.reserve(limit_);
  }

  /// Draw the next token from the logits and decide whether the row ends.
  void take(const float* logits, const TokenSink& sink) {
    if (options_.on_logits) logits = edit(logits);
    Token token = 0;
    named([&] { token = sampler_.sample(logits, seen_); });
    const std::vector<Token>& stop_tokens = options_.stop_tokens;
    if (std::find(stop_tokens.begin(), stop_tokens.end(), token) != stop_tokens.end()) {
      result.reason = FinishReason::stop;
      result.stop_token = token;
      ended = true;
      release(sink);
      return;
    }
    drawn_.push_back(token);
    seen_.push_back(token);
    if (options_.logprobs >= 0) add_logprobs(logits, token);
    result.stop_sequence = matching_.push(token);
    if (result.stop_sequence >= 0) result.reason = FinishReason::stop;
    ended = result.stop_sequence >= 0 || drawn_.size() == limit_;
    release(sink, ended ? 0 : matching_.undecided());
  }

  /// Pass on the tokens that have not been, without the last ones, which stay held back.
  void release(const TokenSink& sink, std::size_t held_back = 0) {
    const std::size_t end = drawn_.size() - std::max(held_back, removed());
    while (released_ < end) {
      const bool ends = sink(index_, drawn_[released_++]);
      session_.check_callback();
      if (!ends) continue;
      ended = true;
      result.reason = FinishReason::stop;
      return;
    }
  }

  /// The token to feed next.
  [[nodiscard]] Token last() const { return drawn_.back(); }

  /// The result, once `fed` tokens of the prompt and the new ones are in the cache.
  Generated finish(std::size_t fed) {
    if (!ended) result.reason = FinishReason::cancelled;
    result.pending.assign(seen_.begin() + static_cast<std::ptrdiff_t>(fed), seen_.end());
    if (result.stop_token >= 0) result.pending.push_back(result.stop_token);
    drawn_.resize(drawn_.size() - removed());
    if (options_.logprobs >= 0) result.logprobs.resize(drawn_.size());
    if (options_.logprobs > 0) result.top_logprobs.resize(drawn_.size());
    result.tokens = std::move(drawn_);
    return std::move(result);
  }

  TokenView prompt;
  Generated result;
  bool ended = false;

 private:
  /// How many of the last drawn tokens are the stop sequence.
  [[nodiscard]] std::size_t removed() const { return matching_.size(result.stop_sequence); }

  /// A copy of the logits, after on_logits.
  const float* edit(const float* logits) {
    named([&] { check_logits(logits, vocab_, false); });
    std::copy_n(logits, vocab_, edited_.begin());
    options_.on_logits(index_, {edited_.data(), vocab_}, drawn_);
    session_.check_callback();
    named([&] { check_logits(edited_.data(), vocab_, true); });
    return edited_.data();
  }

  void add_logprobs(const float* logits, Token token) {
    const LogProbabilities all(logits, vocab_);
    result.logprobs.push_back(all.of(token));
    if (options_.logprobs > 0) {
      result.top_logprobs.push_back(all.top(static_cast<std::size_t>(options_.logprobs)));
    }
  }

  /// Name the row and the token in an error of the sampler.
  template <typename Work>
  void named(const Work& work) const {
    try {
      work();
    } catch (const Error& error) {
      throw Error(error.code(), "row " + std::to_string(index_) + ", new token " +
                                    std::to_string(drawn_.size()) + ": " + error.what());
    }
  }

  int index_;
  const GenerateOptions& options_;
  const SessionCore& session_;
  std::size_t vocab_;
  Sampler sampler_;
  StopSequences matching_;
  std::vector<Token> drawn_;  // also those of a stop sequence
  std::size_t released_ = 0;  // how many of them the sink has had
  std::vector<Token> seen_;   // the prompt and those
  std::vector<float> edited_;
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
  for (std::size_t i = 0; i < options.stop_sequences.size(); ++i) {
    const std::vector<Token>& sequence = options.stop_sequences[i];
    if (sequence.empty()) invalid("stop sequence " + std::to_string(i) + " is empty");
    for (const Token token : sequence) {
      if (token < 0) {
        invalid("an id of stop sequence " + std::to_string(i) + " must be at least 0, got " +
                std::to_string(token));
      }
    }
  }
  const int vocab = session.manifest().info.vocab_size;
  if (options.logprobs < -1 || options.logprobs > vocab) {
    invalid("logprobs must be -1 or in [0, " + std::to_string(vocab) + "], got " +
            std::to_string(options.logprobs));
  }
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
                                const GenerateOptions& options, const TokenSink& sink) {
  const SamplingParams params = checked_params(options);
  check(session, prompts, options);
  const SessionCore::Generating generating(session);
  const auto cancelled = [&options] {
    return options.cancellation != nullptr && options.cancellation->requested();
  };
  if (!options.append) session.reset();
  std::vector<Row> rows;
  std::vector<int> before;
  std::vector<int> prompt_lengths;  // with what the rows hold
  std::size_t longest = 0;
  rows.reserve(prompts.size());
  before.reserve(prompts.size());
  prompt_lengths.reserve(prompts.size());
  for (const TokenView& prompt : prompts) {
    before.push_back(session.length(rows.size()));
    prompt_lengths.push_back(before.back() + static_cast<int>(prompt.size));
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
    const Logits logits = session.prefill(fed.data(), fed.size(), prompt_lengths.data());
    for (std::size_t b = 0; b < rows.size(); ++b) {
      const std::size_t size = rows[b].prompt.size;
      if (start < size && size <= start + chunk) rows[b].take(logits.row(static_cast<int>(b)), sink);
    }
  }
  const auto unfinished = [&rows] {
    return std::any_of(rows.begin(), rows.end(), [](const Row& row) { return !row.ended; });
  };
  while (!stopped && unfinished() && !(stopped = cancelled())) {
    for (std::size_t b = 0; b < rows.size(); ++b) tokens[b] = rows[b].ended ? idle : rows[b].last();
    const Logits logits = session.decode(tokens.data(), tokens.size());
    for (std::size_t b = 0; b < rows.size(); ++b) {
      if (tokens[b] != idle) rows[b].take(logits.row(static_cast<int>(b)), sink);
    }
  }
  std::vector<Generated> results;
  results.reserve(rows.size());
  for (std::size_t b = 0; b < rows.size(); ++b) {
    if (!rows[b].ended) rows[b].release(sink);  // after a cancellation
    results.push_back(rows[b].finish(static_cast<std::size_t>(session.length(b) - before[b])));
  }
  return results;
}

}  // namespace qwenport::detail
