#include <doctest/doctest.h>

#include <algorithm>
#include <optional>
#include <random>
#include <thread>

#include "qwenport/qwenport.hpp"
#include "sampling.hpp"
#include "stand_in.hpp"

using qwenport::Cancellation;
using qwenport::Engine;
using qwenport::ErrorCode;
using qwenport::FinishReason;
using qwenport::Generated;
using qwenport::GenerateOptions;
using qwenport::Session;
using qwenport::Token;
using Rows = std::vector<std::vector<Token>>;

namespace {

/// One row generated the plain way: the definition of the network and the sampler, no session.
Generated expected(const qwenport::detail::Manifest& manifest, std::vector<Token> held, std::uint64_t row,
                   int capacity, const GenerateOptions& options) {
  qwenport::detail::Sampler sampler(qwenport::detail::checked_params(options), options.seed, row,
                                    manifest.info.vocab_size);
  Generated result;
  for (;;) {
    const Token token = sampler.sample(stand_in::toy_logits(manifest, held).data(), held);
    if (std::count(options.stop_tokens.begin(), options.stop_tokens.end(), token) != 0) {
      result.reason = FinishReason::stop;
      result.stop_token = token;
      return result;
    }
    result.tokens.push_back(token);
    if (result.tokens.size() == static_cast<std::size_t>(options.max_new_tokens)) return result;
    if (held.size() == static_cast<std::size_t>(capacity)) {
      result.reason = FinishReason::capacity;
      return result;
    }
    held.push_back(token);
  }
}

bool same(const Generated& a, const Generated& b) {
  return a.tokens == b.tokens && a.reason == b.reason && a.stop_token == b.stop_token;
}

}  // namespace

TEST_CASE("a batch gives each row what the row alone would get") {
  std::mt19937 random(7);
  const auto below = [&random](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  std::array<int, 4> reasons{};
  for (int round = 0; round < 60; ++round) {
    CAPTURE(round);
    const auto model = stand_in::toy_model(160, 4, 24);
    const int capacity = round % 3 == 0 ? 40 : 160;
    Session session(Engine(model), {4, capacity, round % 2 == 0});
    session.prefill_batch({{1, 2}, {3}});  // forgotten by generate
    Rows prompts(1 + static_cast<std::size_t>(below(4)));
    for (auto& prompt : prompts) {
      prompt.resize(1 + static_cast<std::size_t>(below(40)));
      for (Token& token : prompt) token = below(97);
    }
    GenerateOptions options;
    options.max_new_tokens = 1 + below(60);
    for (int i = below(3); i > 0; --i) options.stop_tokens.push_back(below(97));
    options.temperature = below(2) == 0 ? 0 : 0.8;
    options.top_k = below(2) == 0 ? 0 : 20;
    options.top_p = below(2) == 0 ? 1 : 0.9;
    options.repetition_penalty = below(2) == 0 ? 1 : 1.2;
    options.seed = random();
    Rows streamed(prompts.size());
    const auto results = session.generate_batch(prompts, options, [&](int row, Token token) {
      streamed[static_cast<std::size_t>(row)].push_back(token);
    });
    REQUIRE(results.size() == prompts.size());
    for (std::size_t b = 0; b < prompts.size(); ++b) {
      CHECK(same(results[b], expected(model->manifest(), prompts[b], b, capacity, options)));
      CHECK(results[b].tokens == streamed[b]);
      ++reasons.at(static_cast<std::size_t>(results[b].reason));
    }
  }
  for (const auto reason : {FinishReason::stop, FinishReason::length, FinishReason::capacity}) {
    CHECK(reasons.at(static_cast<std::size_t>(reason)) > 5);  // each of them was seen
  }
}

TEST_CASE("cancellation ends a generation with what there is") {
  const auto model = stand_in::toy_model(512, 2, 24);
  Session session(Engine(model), {2, 0, true});
  GenerateOptions options;
  options.max_new_tokens = 400;
  const auto whole = session.generate_batch({{1, 2, 3}, {4}}, options);

  Cancellation before;
  before.request();
  options.cancellation = &before;
  auto results = session.generate_batch({{1, 2, 3}, {4}}, options);
  CHECK(results[0].tokens.empty());
  CHECK(results[1].reason == FinishReason::cancelled);

  Cancellation during;
  options.cancellation = &during;
  results = session.generate_batch({{1, 2, 3}, {4}}, options, [&](int row, Token) {
    static int seen = 0;
    if (row == 0 && ++seen == 10) during.request();
  });
  for (std::size_t b = 0; b < 2; ++b) {
    CHECK(results[b].reason == FinishReason::cancelled);
    CHECK(results[b].tokens == std::vector<Token>(whole[b].tokens.begin(), whole[b].tokens.begin() + 10));
  }
  options.cancellation = nullptr;
  CHECK(same(session.generate_batch({{1, 2, 3}, {4}}, options)[0], whole[0]));
}

TEST_CASE("a generation goes on from what it left pending, as if nothing had ended") {
  std::mt19937 random(11);
  const auto below = [&random](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  std::array<int, 4> reasons{};
  for (int round = 0; round < 80; ++round) {
    CAPTURE(round);
    const auto model = stand_in::toy_model(160, 3, 24);
    Session session(Engine(model), {3, 0, round % 2 == 0});
    Rows said(3);  // all that was given and drawn
    Rows pending(3);
    for (int turn = 0; turn < 5; ++turn) {
      Cancellation cancellation;
      const int cancel_at = below(3) == 0 ? below(6) : 1000;
      if (cancel_at == 0) cancellation.request();
      int seen = 0;
      GenerateOptions options;
      options.append = true;
      options.max_new_tokens = 1 + below(12);
      for (int i = below(6); i > 0; --i) options.stop_tokens.push_back(below(97));
      options.cancellation = &cancellation;
      Rows prompts = pending;
      for (std::size_t b = 0; b < 3; ++b) {
        for (int i = below(9) == 0 ? 30 : 1 + below(3); i > 0; --i) {
          prompts[b].push_back(below(97));
          said[b].push_back(prompts[b].back());
        }
      }
      if (std::any_of(said.begin(), said.end(), [](const auto& row) { return row.size() > 140; })) break;
      const auto results = session.generate_batch(prompts, options, [&](int, Token) {
        if (++seen == cancel_at) cancellation.request();
      });
      for (std::size_t b = 0; b < 3; ++b) {
        const Generated& result = results[b];
        ++reasons.at(static_cast<std::size_t>(result.reason));
        if (result.reason != FinishReason::cancelled) {
          REQUIRE(same(result, expected(model->manifest(), said[b], b, 160, options)));
        }
        said[b].insert(said[b].end(), result.tokens.begin(), result.tokens.end());
        if (result.reason == FinishReason::stop) said[b].push_back(result.stop_token);
        pending[b] = result.pending;
        const auto held = static_cast<std::size_t>(session.lengths()[b]);
        REQUIRE(held + pending[b].size() == said[b].size());
        REQUIRE(std::equal(pending[b].begin(), pending[b].end(), said[b].begin() + static_cast<long>(held)));
      }
    }
  }
  for (const auto reason : {FinishReason::stop, FinishReason::length, FinishReason::cancelled}) {
    CHECK(reasons.at(static_cast<std::size_t>(reason)) > 20);
  }
}

TEST_CASE("another thread may cancel") {
  const auto model = stand_in::toy_model(2048, 1, 24);
  Session session{Engine(model)};
  Cancellation cancellation;
  GenerateOptions options;
  options.max_new_tokens = 2000;
  options.cancellation = &cancellation;
  std::atomic<int> generated{0};
  std::thread other([&] {
    while (generated.load() < 20) std::this_thread::yield();
    cancellation.request();
  });
  const Generated result = session.generate({1, 2, 3}, options, [&](int, Token) {
    if (++generated >= 40) {  // however slow the other thread is, its request comes before the end
      while (!cancellation.requested()) std::this_thread::yield();
    }
  });
  other.join();
  CHECK(result.reason == FinishReason::cancelled);
  CHECK(result.tokens.size() >= 20);
  CHECK(result.tokens.size() <= 40);
}

TEST_CASE("two sessions of one engine run on two threads and do not notice each other") {
  const auto model = stand_in::toy_model(160, 2, 24);
  const Engine engine(model);
  GenerateOptions options;
  options.max_new_tokens = 100;
  options.temperature = 1;
  std::vector<std::vector<Generated>> results(2);
  std::vector<std::thread> threads;
  threads.reserve(2);
  for (std::size_t i = 0; i < 2; ++i) {
    threads.emplace_back([&, i] {
      Session session(engine, {2, 0, true});
      for (int round = 0; round < 5; ++round) {
        results[i] = session.generate_batch({{static_cast<Token>(i)}, {5, 6}}, options);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (std::size_t i = 0; i < 2; ++i) {
    CHECK(same(results[i][0], expected(model->manifest(), {static_cast<Token>(i)}, 0, 160, options)));
    CHECK(same(results[i][1], expected(model->manifest(), {5, 6}, 1, 160, options)));
  }
}

TEST_CASE("generating allocates no host memory a token once its graph is there") {
  const auto model = stand_in::toy_model(64, 2, 24);
  Session session(Engine(model), {2, 0, true});
  GenerateOptions options;
  options.max_new_tokens = 50;
  options.temperature = 0.9;
  options.top_k = 30;
  options.top_p = 0.9;
  options.repetition_penalty = 1.1;
  std::array<long, 128> at{};
  std::size_t tokens = 0;
  session.generate_batch({{1, 2, 3}, {4}}, options,
                         [&](int, Token) { at.at(tokens++) = stand_in::allocations; });
  REQUIRE(tokens == 100);
  CHECK(at.at(99) == at.at(10));
}

TEST_CASE("what a callback throws ends the generation and arrives") {
  const auto model = stand_in::toy_model();
  Session session{Engine(model)};
  CHECK_THROWS_AS(session.generate({1}, {}, [](int, Token) { throw std::range_error("enough"); }),
                  std::range_error);
  CHECK(session.generate({1}, {}).tokens.size() == 160);
}

TEST_CASE("a request that cannot be run is refused before anything runs") {
  const auto model = stand_in::toy_model();
  Session session(Engine(model), {2, 10, true});
  session.prefill({1, 2, 3});
  const auto code = [&](const Rows& prompts, const GenerateOptions& options) {
    std::optional<ErrorCode> code;
    try {
      session.generate_batch(prompts, options);
    } catch (const qwenport::Error& error) {
      code = error.code();
    }
    return code;
  };
  const auto with = [](auto change) {
    GenerateOptions options;
    change(options);
    return options;
  };
  const GenerateOptions good;
  CHECK(code({{1}, {}}, good) == ErrorCode::invalid_argument);
  CHECK(code({{1}, {2}, {3}}, good) == ErrorCode::invalid_argument);
  CHECK(code({{97}}, good) == ErrorCode::invalid_argument);
  CHECK(code({{-1}}, good) == ErrorCode::invalid_argument);
  CHECK(code({std::vector<Token>(11, 1)}, good) == ErrorCode::capacity);
  CHECK(code({{1}}, with([](auto& o) { o.max_new_tokens = 0; })) == ErrorCode::invalid_argument);
  CHECK(code({{1}}, with([](auto& o) { o.stop_tokens = {-1}; })) == ErrorCode::invalid_argument);
  CHECK(code({{1}}, with([](auto& o) { o.temperature = -1; })) == ErrorCode::invalid_argument);
  CHECK(code({{1}}, with([](auto& o) { o.top_p = 1.5; })) == ErrorCode::invalid_argument);
  CHECK(session.lengths() == std::vector<int>{3, 0});
  CHECK(session.generate_batch({}, good).empty());
}
