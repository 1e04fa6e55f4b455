// A real engine in onnxruntime, through the public API. The environment says which: QWENPORT_TEST_ENGINE, and for the library
// QWENPORT_ONNXRUNTIME; for the grammar QWENPORT_TEST_DIGITS, the tokens that it allows, and QWENPORT_TEST_WRITTEN, what
// must come. What the tokens must be is compared with Python's session in test_onnxruntime.py; here a session
// is compared with itself, and sanitizers watch.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <sstream>
#include <thread>

#include "qwenport/qwenport.hpp"

namespace {

using qwenport::Engine;
using qwenport::EngineOptions;
using qwenport::Error;
using qwenport::ErrorCode;
using qwenport::FinishReason;
using qwenport::GenerateOptions;
using qwenport::Session;
using qwenport::SessionOptions;
using qwenport::Token;

using Tokens = std::vector<Token>;

Engine load(const EngineOptions& options = {}) {
  const char* const directory = std::getenv("QWENPORT_TEST_ENGINE");  // NOLINT(concurrency-mt-unsafe)
  REQUIRE(directory != nullptr);
  return Engine::load(directory, options);
}

Tokens counting(Token first, std::size_t count) {
  Tokens tokens(count);
  for (std::size_t i = 0; i < count; ++i) tokens[i] = first + static_cast<Token>(i);
  return tokens;
}

std::vector<float> copy(const qwenport::Logits& logits, int row = 0) {
  const float* const values = logits.row(row);
  REQUIRE(values != nullptr);
  return {values, values + logits.vocab_size()};
}

SessionOptions sized(int max_batch, int capacity) {
  SessionOptions options;
  options.max_batch = max_batch;
  options.capacity = capacity;
  return options;
}

}  // namespace

TEST_CASE("a truncated row computes the same logits again") {
  Session session(load(), sized(2, 120));
  session.prefill_batch({counting(5, 70), counting(9, 3)});
  const auto first = copy(session.decode_batch({11, 12}), 0);
  session.decode_batch({13, 14});
  session.truncate(70, 0);
  session.truncate(3, 1);
  CHECK(copy(session.decode_batch({11, 12}), 0) == first);
}

TEST_CASE("a restored session goes on where the saved one was") {
  const Engine engine = load();
  Session session(engine, sized(2, 100));
  session.prefill_batch({counting(5, 40), counting(9, 3)});
  const auto snapshot = session.save();
  const auto expected = copy(session.decode_batch({11, 12}), 1);

  Session other(engine, sized(2, 100));
  other.restore(snapshot);
  CHECK(other.lengths() == std::vector<int>{40, 3});
  CHECK(copy(other.decode_batch({11, 12}), 1) == expected);

  Session longer(engine, sized(2, 150));  // another layout of the cache
  longer.restore(snapshot);
  CHECK(copy(longer.decode_batch({11, 12}), 1) == expected);
  auto damaged = snapshot;
  damaged.back() ^= std::byte{1};
  CHECK_THROWS_AS(longer.restore(damaged), Error);
}

TEST_CASE("pieces that state their prompt's length make the same logits as a prompt in one call") {
  Session session(load(), sized(2, 150));
  const auto prompt = counting(5, 120);
  const auto whole = copy(session.prefill(prompt));
  session.reset();
  session.prefill_batch({Tokens(prompt.begin(), prompt.begin() + 90), counting(9, 3)}, {120, 3});
  const auto pieces = copy(session.prefill(Tokens(prompt.begin() + 90, prompt.end()), 120));
  for (std::size_t i = 0; i < whole.size(); ++i) CHECK(pieces[i] == doctest::Approx(whole[i]).epsilon(1e-3));
  CHECK_THROWS_WITH_AS(session.prefill({7}, 120),
                       "row 0: a prompt of 120 tokens, where 121 to 150 are possible", Error);
}

TEST_CASE("logits of rows that end in an earlier step are kept") {
  Session session(load(), sized(3, 100));
  const auto width = static_cast<std::size_t>(load().info().max_step_tokens);
  const auto rows = std::vector<Tokens>{counting(5, 90), counting(9, 3), {}};
  const auto logits = session.prefill_batch(rows);
  CHECK(logits.row(2) == nullptr);
  const auto together = copy(logits, 1);
  Session alone(load());
  const auto single = copy(alone.prefill(rows[1]));
  for (std::size_t i = 0; i < single.size(); ++i)
    CHECK(together[i] == doctest::Approx(single[i]).epsilon(1e-3));
  CHECK((width >= 90 || session.lengths()[0] == 90));
}

TEST_CASE("a conversation that appends writes what one prompt of all of it writes") {
  Session session(load());
  GenerateOptions options;
  options.max_new_tokens = 12;
  const auto reply = session.generate(counting(40, 10), options);
  Tokens next = reply.pending;
  next.insert(next.end(), {7, 8, 9});
  options.append = true;
  const auto second = session.generate(next, options);

  Tokens all = counting(40, 10);
  all.insert(all.end(), reply.tokens.begin(), reply.tokens.end());
  all.insert(all.end(), {7, 8, 9});
  options.append = false;
  CHECK(session.generate(all, options).tokens == second.tokens);
}

TEST_CASE("another thread cancels, also within a long prompt") {
  Session session(load());
  qwenport::Cancellation cancellation;
  GenerateOptions options;
  options.max_new_tokens = 400;
  options.cancellation = &cancellation;
  int seen = 0;
  const auto result = session.generate({1, 2, 3}, options, [&](int, Token) {
    if (++seen != 5) return;
    std::thread([&] { cancellation.request(); }).join();
  });
  CHECK(result.reason == FinishReason::cancelled);
  CHECK(result.tokens.size() == 5);
  const auto nothing = session.generate(counting(0, 300), options);
  CHECK(nothing.reason == FinishReason::cancelled);
  CHECK(nothing.pending == counting(0, 300));
}

TEST_CASE("sessions of one engine run on threads of their own, and outlive it") {
  std::vector<Tokens> together(4);
  std::vector<Tokens> alone;
  GenerateOptions options;
  options.max_new_tokens = 30;
  options.temperature = 0.8;
  {
    std::vector<Session> sessions;
    {
      const Engine engine = load();
      for (std::size_t i = 0; i < together.size(); ++i) sessions.emplace_back(engine);
    }
    std::vector<std::thread> threads;
    threads.reserve(together.size());
    for (std::size_t i = 0; i < together.size(); ++i) {
      threads.emplace_back([&, i] {
        together[i] = sessions[i].generate(counting(static_cast<Token>(3 + i), 20), options).tokens;
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (std::size_t i = 0; i < together.size(); ++i) {
      alone.push_back(sessions[i].generate(counting(static_cast<Token>(3 + i), 20), options).tokens);
    }
  }
  CHECK(together == alone);
}

TEST_CASE("a grammar of digits writes what transformers writes under it") {
  const auto tokens_of = [](const char* name) {  // ids, separated by blanks
    const char* const text = std::getenv(name);  // NOLINT(concurrency-mt-unsafe)
    REQUIRE(text != nullptr);
    std::istringstream words(text);
    return Tokens(std::istream_iterator<Token>(words), {});
  };
  const Tokens digits = tokens_of("QWENPORT_TEST_DIGITS");
  const Tokens written = tokens_of("QWENPORT_TEST_WRITTEN");
  REQUIRE(digits.size() >= 10);
  GenerateOptions options;
  options.max_new_tokens = static_cast<int>(written.size());
  options.logprobs = 2;
  options.on_logits = [&](int, qwenport::EditableLogits logits, const Tokens&) {
    for (std::size_t token = 0; token < logits.size(); ++token) {
      const bool allowed = std::find(digits.begin(), digits.end(), static_cast<Token>(token)) != digits.end();
      if (!allowed) logits[token] = -std::numeric_limits<float>::infinity();
    }
  };
  Session session(load());
  const auto result = session.generate({40, 41, 42}, options);
  CHECK(result.tokens == written);
  CHECK(result.logprobs.size() == written.size());
  CHECK(result.top_logprobs.back().front().token == written.back());  // it is greedy
}

TEST_CASE("a full row is an error, and nothing is written") {
  Session session(load(), sized(1, 20));
  session.prefill(counting(3, 20));
  try {
    session.decode(1);
    FAIL("no error");
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::capacity);
  }
  session.truncate(19);
  session.decode(1);
  CHECK(session.lengths() == std::vector<int>{20});
}

TEST_CASE("both load modes and any number of threads write the same text") {
  GenerateOptions options;
  options.max_new_tokens = 40;
  std::vector<Tokens> texts;
  for (const auto load_mode : {qwenport::LoadMode::fast_steps, qwenport::LoadMode::fast_start}) {
    for (const int threads : {0, 1, 2}) {
      EngineOptions given;
      given.load = load_mode;
      given.threads = threads;
      Session session(load(given));
      texts.push_back(session.generate({40, 41, 42}, options).tokens);
    }
  }
  CHECK(std::all_of(texts.begin(), texts.end(), [&](const Tokens& text) { return text == texts.front(); }));
  EngineOptions wrong;
  wrong.threads = -1;
  CHECK_THROWS_WITH_AS(load(wrong), "threads must be in [0, 1024], got -1", Error);
}
