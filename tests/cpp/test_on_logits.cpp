// The logits hook, log-probabilities and stop sequences, against their definitions, on the toy network.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <thread>

#include "qwenport/qwenport.hpp"
#include "sampling.hpp"
#include "stand_in.hpp"
#include "stop_sequences.hpp"

using qwenport::Cancellation;
using qwenport::EditableLogits;
using qwenport::Engine;
using qwenport::Error;
using qwenport::ErrorCode;
using qwenport::FinishReason;
using qwenport::Generated;
using qwenport::GenerateOptions;
using qwenport::Session;
using qwenport::Token;
using Tokens = std::vector<Token>;
using Rows = std::vector<Tokens>;

namespace {

constexpr float banned = -std::numeric_limits<float>::infinity();

bool ends_with(const Tokens& tokens, const Tokens& end) {
  return tokens.size() >= end.size() && std::equal(end.rbegin(), end.rend(), tokens.rbegin());
}

/// How many of the last tokens are the beginning of a sequence, by trying every number of them.
std::size_t undecided(const Tokens& drawn, const Rows& sequences) {
  std::size_t most = 0;
  for (const Tokens& sequence : sequences) {
    for (std::size_t n = 1; n < sequence.size(); ++n) {
      if (ends_with(drawn, {sequence.begin(), sequence.begin() + static_cast<long>(n)}))
        most = std::max(most, n);
    }
  }
  return most;
}

/// One row generated the plain way: the definition of the network and the sampler, no session.
Generated expected(const qwenport::detail::Manifest& manifest, Tokens held, int row,
                   const GenerateOptions& options) {
  qwenport::detail::Sampler sampler(qwenport::detail::checked_params(options), options.seed,
                                    static_cast<std::uint64_t>(row), manifest.info.vocab_size);
  Generated result;
  while (result.tokens.size() < static_cast<std::size_t>(options.max_new_tokens)) {
    auto logits = stand_in::toy_logits(manifest, held);
    if (options.on_logits) options.on_logits(row, {logits.data(), logits.size()}, result.tokens);
    result.tokens.push_back(sampler.sample(logits.data(), held));
    held.push_back(result.tokens.back());
    for (std::size_t i = 0; i < options.stop_sequences.size(); ++i) {
      const auto size = [&](int at) { return options.stop_sequences[static_cast<std::size_t>(at)].size(); };
      if (ends_with(result.tokens, options.stop_sequences[i]) &&
          (result.stop_sequence < 0 || size(static_cast<int>(i)) > size(result.stop_sequence))) {
        result.stop_sequence = static_cast<int>(i);
      }
    }
    if (result.stop_sequence < 0) continue;
    result.reason = FinishReason::stop;
    const std::size_t removed = options.stop_sequences[static_cast<std::size_t>(result.stop_sequence)].size();
    result.tokens.resize(result.tokens.size() - removed);
    break;
  }
  return result;
}

void allow_every_third(int row, EditableLogits logits, const Tokens& tokens) {
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if ((i + static_cast<std::size_t>(row) + tokens.size()) % 3 != 0) logits[i] = banned;
  }
}

}  // namespace

TEST_CASE("tokens are drawn from the edited logits, and held back as long as they may begin a sequence") {
  std::mt19937 random(5);
  const auto below = [&random](std::size_t n) { return random() % n; };
  const auto model = stand_in::toy_model(160, 3, 24);
  int stopped = 0;
  int held_back = 0;
  for (int round = 0; round < 60; ++round) {
    CAPTURE(round);
    Session session(Engine(model), {3, 0, round % 2 == 0});
    const Rows prompts = {Tokens(1 + below(40), 5), {7, static_cast<Token>(below(97))}, {9}};
    GenerateOptions options;
    options.max_new_tokens = 30;
    options.temperature = below(2) == 0 ? 0 : 0.8;
    options.seed = random();
    options.on_logits = allow_every_third;
    const GenerateOptions endless = options;
    for (std::size_t b = 0; b < 3 && round % 3 != 0; ++b) {  // pieces of what would be written
      const Tokens whole = expected(model->manifest(), prompts[b], static_cast<int>(b), endless).tokens;
      const std::size_t begin = below(28);
      const auto piece = [&](std::size_t from, std::size_t to) {
        return Tokens(whole.begin() + static_cast<long>(from), whole.begin() + static_cast<long>(to));
      };
      options.stop_sequences.push_back(piece(begin, begin + 1 + below(2)));
      options.stop_sequences.push_back(piece(begin, begin + 2));
      options.stop_sequences.back().push_back(96);  // it fails at the end
    }
    const GenerateOptions plain = options;
    Rows streamed(3);
    options.on_logits = [&](int row, EditableLogits logits, const Tokens& tokens) {
      const auto& mine = streamed[static_cast<std::size_t>(row)];
      const std::size_t waiting = undecided(tokens, options.stop_sequences);
      held_back += waiting != 0 ? 1 : 0;
      CHECK(mine == Tokens(tokens.begin(), tokens.end() - static_cast<long>(waiting)));
      CHECK(logits.size() == 97);
      CHECK(logits.end() - logits.begin() == 97);
      allow_every_third(row, logits, tokens);
    };
    const auto results = session.generate_batch(prompts, options, [&](int row, Token token) {
      streamed[static_cast<std::size_t>(row)].push_back(token);
    });
    for (std::size_t b = 0; b < 3; ++b) {
      const auto wanted = expected(model->manifest(), prompts[b], static_cast<int>(b), plain);
      CHECK(results[b].tokens == wanted.tokens);
      CHECK(results[b].reason == wanted.reason);
      CHECK(results[b].stop_sequence == wanted.stop_sequence);
      CHECK(results[b].pending.size() == 1);
      CHECK(streamed[b] == results[b].tokens);
      stopped += wanted.stop_sequence >= 0 ? 1 : 0;
    }
  }
  CHECK(stopped > 20);
  CHECK(held_back > 20);
}

TEST_CASE("matching sequences that repeat and overlap equals trying every end") {
  std::mt19937 random(3);
  std::array<int, 4> found_at{};
  for (int round = 0; round < 3000; ++round) {
    CAPTURE(round);
    Rows sequences(1 + random() % 4);
    for (Tokens& sequence : sequences) {
      sequence.resize(1 + random() % 9);
      for (Token& token : sequence) token = static_cast<Token>(random() % 2);
    }
    qwenport::detail::StopSequences matching(sequences);
    Tokens drawn;
    int found = -1;
    while (found < 0 && drawn.size() < 40) {
      drawn.push_back(static_cast<Token>(random() % 2));
      found = matching.push(drawn.back());
      int wanted = -1;
      for (std::size_t i = 0; i < sequences.size(); ++i) {
        if (ends_with(drawn, sequences[i]) && sequences[i].size() > matching.size(wanted)) {
          wanted = static_cast<int>(i);
        }
      }
      REQUIRE(found == wanted);
      if (found < 0) REQUIRE(matching.undecided() == undecided(drawn, sequences));
    }
    if (found >= 0) ++found_at.at(static_cast<std::size_t>(found));
  }
  CHECK(found_at[3] > 100);
}

TEST_CASE("log-probabilities are those of the edited logits") {
  const auto model = stand_in::toy_model(160, 2, 24);
  Session session(Engine(model), {2, 0, true});
  GenerateOptions options;
  options.max_new_tokens = 12;
  options.temperature = 0.8;
  options.logprobs = 40;
  options.on_logits = allow_every_third;
  const Rows prompts = {{1, 2, 3}, {4}};
  const auto results = session.generate_batch(prompts, options);
  for (std::size_t b = 0; b < 2; ++b) {
    Tokens held = prompts[b];
    REQUIRE(results[b].logprobs.size() == 12);
    REQUIRE(results[b].top_logprobs.size() == 12);
    for (std::size_t i = 0; i < 12; ++i) {
      auto logits = stand_in::toy_logits(model->manifest(), held);
      const Tokens drawn(results[b].tokens.begin(), results[b].tokens.begin() + static_cast<long>(i));
      allow_every_third(static_cast<int>(b), {logits.data(), logits.size()}, drawn);
      double total = 0;
      for (const float logit : logits) total += std::exp(static_cast<double>(logit));
      const auto wanted = [&](Token token) {
        return static_cast<double>(logits[static_cast<std::size_t>(token)]) - std::log(total);
      };
      held.push_back(results[b].tokens[i]);
      CHECK(results[b].logprobs[i] == doctest::Approx(wanted(held.back())));
      REQUIRE(results[b].top_logprobs[i].size() == 40);
      CHECK(results[b].top_logprobs[i][0].logprob ==
            doctest::Approx(wanted(results[b].top_logprobs[i][0].token)));
      CHECK(results[b].top_logprobs[i][39].logprob == banned);  // a third of 97 is allowed
    }
  }
  options.logprobs = 0;
  const auto drawn_only = session.generate_batch(prompts, options);
  CHECK(drawn_only[1].logprobs == results[1].logprobs);
  CHECK(drawn_only[1].top_logprobs.empty());
}

TEST_CASE("a hook and stop sequences allocate no host memory a token") {
  const auto model = stand_in::toy_model(64, 2, 24);
  Session session(Engine(model), {2, 0, true});
  GenerateOptions options;
  options.max_new_tokens = 50;
  options.on_logits = [](int, EditableLogits logits, const Tokens&) { logits[3] = banned; };
  options.stop_sequences = {{3}, {5, 6, 3}, {1, 1, 1, 3}};  // 3 never comes
  std::array<long, 128> at{};
  std::size_t tokens = 0;
  session.generate_batch({{1, 2, 3}, {4}}, options,
                         [&](int, Token) { at.at(tokens++) = stand_in::allocations; });
  REQUIRE(tokens == 100);
  CHECK(at.at(99) == at.at(10));
}

TEST_CASE("a hook that leaves nothing to draw is blamed, and what it throws arrives") {
  const auto model = stand_in::toy_model();
  Session session{Engine(model)};
  const auto with = [](auto edit) {
    GenerateOptions options;
    options.on_logits = [edit](int, EditableLogits logits, const Tokens& tokens) {
      if (tokens.size() == 2) edit(logits);
    };
    return options;
  };
  const auto fill = [](float value) {
    return [value](EditableLogits logits) { std::fill(logits.begin(), logits.end(), value); };
  };
  CHECK_THROWS_WITH_AS(session.generate({1}, with(fill(banned))),
                       "row 0, new token 2: no token can be chosen: on_logits banned every token", Error);
  CHECK_THROWS_WITH_AS(
      session.generate({1}, with(fill(std::nanf("")))),
      "row 0, new token 2: no token can be chosen: the highest of the logits after on_logits is nan", Error);
  CHECK_THROWS_WITH_AS(
      session.generate({1}, with([](EditableLogits) { throw Error(ErrorCode::internal, "mine"); })), "mine",
      Error);
  CHECK_THROWS_AS(session.generate({1}, with([](EditableLogits) { throw std::range_error("enough"); })),
                  std::range_error);
  CHECK(session.generate({1}, {}).tokens.size() == 160);
}

TEST_CASE("a cancelled row gives what it held back") {
  const auto model = stand_in::toy_model();
  Session session{Engine(model)};
  GenerateOptions options;
  options.max_new_tokens = 20;
  const Tokens whole = session.generate({1}, options).tokens;
  Cancellation cancellation;
  options.cancellation = &cancellation;
  options.stop_sequences = {{whole[8], whole[9], 96}};
  options.on_logits = [&](int, EditableLogits, const Tokens& tokens) {
    if (tokens.size() == 9) cancellation.request();
  };
  Tokens streamed;
  const auto result = session.generate({1}, options, [&](int, Token token) { streamed.push_back(token); });
  CHECK(result.reason == FinishReason::cancelled);
  CHECK(result.tokens == Tokens(whole.begin(), whole.begin() + 10));
  CHECK(streamed == result.tokens);
  CHECK(result.pending == Tokens{whole[9]});
}

TEST_CASE("a generation goes on after a stop sequence as if all of it had been there") {
  const auto model = stand_in::toy_model();
  Session session{Engine(model)};
  GenerateOptions options;
  options.max_new_tokens = 20;
  const Tokens whole = session.generate({1}, options).tokens;
  options.stop_sequences = {{whole[8], whole[9], whole[10]}};
  const auto first = session.generate({1}, options);
  CHECK(first.tokens == Tokens(whole.begin(), whole.begin() + 8));
  CHECK(first.pending == Tokens{whole[10]});
  CHECK(session.lengths() == std::vector<int>{11});
  options.append = true;
  options.stop_sequences.clear();
  options.max_new_tokens = 9;
  CHECK(session.generate(first.pending, options).tokens == Tokens(whole.begin() + 11, whole.end()));
}

TEST_CASE("hooks of two sessions run on two threads and do not notice each other") {
  const auto model = stand_in::toy_model(160, 2, 24);
  const Engine engine(model);
  std::array<Tokens, 2> results;
  GenerateOptions options;
  options.max_new_tokens = 60;
  options.temperature = 1;
  options.logprobs = 3;
  options.on_logits = allow_every_third;
  std::vector<std::thread> threads;
  threads.reserve(2);
  for (std::size_t i = 0; i < 2; ++i) {
    threads.emplace_back([&, i] {
      Session session(engine, {1, 0, true});
      results.at(i) = session.generate({static_cast<Token>(i)}, options).tokens;
    });
  }
  for (auto& thread : threads) thread.join();
  for (std::size_t i = 0; i < 2; ++i) {
    CHECK(results.at(i) == expected(model->manifest(), {static_cast<Token>(i)}, 0, options).tokens);
  }
}

TEST_CASE("sequences and log-probabilities that cannot be are refused before anything runs") {
  const auto model = stand_in::toy_model();
  Session session{Engine(model)};
  session.prefill({1, 2, 3});
  GenerateOptions options;
  options.stop_sequences = {{1}, {}};
  CHECK_THROWS_WITH_AS(session.generate({1}, options), "stop sequence 1 is empty", Error);
  options.stop_sequences = {{1, -1}};
  CHECK_THROWS_WITH_AS(session.generate({1}, options), "an id of stop sequence 0 must be at least 0, got -1",
                       Error);
  options.stop_sequences.clear();
  for (const int logprobs : {-2, 98}) {
    options.logprobs = logprobs;
    CHECK_THROWS_WITH_AS(session.generate({1}, options),
                         doctest::Contains("logprobs must be -1 or in [0, 97], got "), Error);
  }
  CHECK(session.lengths() == std::vector<int>{3});
}
