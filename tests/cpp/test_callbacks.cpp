// What a callback that uses its own session gets, on the toy network.
#include <doctest/doctest.h>

#include "qwenport/qwenport.hpp"
#include "stand_in.hpp"

using qwenport::Engine;
using qwenport::Error;
using qwenport::ErrorCode;
using qwenport::GenerateOptions;
using qwenport::Session;
using qwenport::Token;
using Tokens = std::vector<Token>;

namespace {

struct Use {
  const char* name;
  std::function<void(Session&)> call;
};

const std::vector<Use>& uses() {
  static const std::vector<Use> all{
      {"prefill", [](Session& s) { s.prefill({1}); }},
      {"prefill_batch", [](Session& s) { s.prefill_batch({{1}, {2}}); }},
      {"decode", [](Session& s) { s.decode(3); }},
      {"decode_batch", [](Session& s) { s.decode_batch({3, 4}); }},
      {"generate", [](Session& s) { s.generate({3}); }},
      {"generate_batch", [](Session& s) { s.generate_batch({{3}, {4}}); }},
      {"reset", [](Session& s) { s.reset(); }},
      {"truncate", [](Session& s) { s.truncate(0); }},
      {"save", [](Session& s) { static_cast<void>(s.save()); }},
      {"restore", [](Session& s) { s.restore({}); }},
  };
  return all;
}

/// Generate and call `work` at the second token, by on_token or on_logits.
Tokens generate(Session& session, bool by_hook, const std::function<void()>& work) {
  GenerateOptions options;
  options.max_new_tokens = 6;
  int calls = 0;
  const auto at_second = [&] {
    if (++calls == 2) work();
  };
  if (by_hook) options.on_logits = [&](int, qwenport::EditableLogits, const Tokens&) { at_second(); };
  return session
      .generate({5, 6}, options,
                [&](int, Token) {
                  if (!by_hook) at_second();
                })
      .tokens;
}

}  // namespace

TEST_CASE("a callback's use of its session is refused, ends the generation and changes nothing") {
  const Engine engine(stand_in::toy_model());
  for (const Use& use : uses()) {
    for (const bool by_hook : {false, true}) {
      for (const bool ignored : {false, true}) {
        CAPTURE(use.name);
        CAPTURE(by_hook);
        CAPTURE(ignored);
        Session session(engine, {2, 0, true});
        const Tokens expected = generate(session, by_hook, [] {});
        bool refused = false;
        const auto work = [&] {
          try {
            use.call(session);
          } catch (const Error& error) {
            refused = error.code() == ErrorCode::invalid_argument;
            if (!ignored) throw;
          }
        };
        CHECK_THROWS_WITH_AS(generate(session, by_hook, work), "a callback must not use its session", Error);
        CHECK(refused);
        CHECK(session.lengths() == std::vector<int>{3, 0});  // the prompt and the token that was fed
        CHECK(generate(session, by_hook, [] {}) == expected);
      }
    }
  }
}

TEST_CASE("a callback may ask its session for sizes, and use another session") {
  const Engine engine(stand_in::toy_model());
  Session session(engine);
  Session other(engine);
  const Tokens expected = generate(session, true, [] {});
  const auto work = [&] {
    CHECK(session.lengths() == std::vector<int>{3});
    CHECK(session.capacity() == 160);
    CHECK(session.max_batch() == 1);
    CHECK(session.cuda_graphs());
    CHECK(generate(other, true, [] {}) == expected);
  };
  CHECK(generate(session, true, work) == expected);
}

TEST_CASE("a session that a callback moves or destroys lives until its generation has ended") {
  const Engine engine(stand_in::toy_model());
  auto session = std::make_unique<Session>(engine);
  const Tokens expected = generate(*session, false, [] {});
  CHECK(generate(*session, false, [&] { session.reset(); }) == expected);
  session = std::make_unique<Session>(engine);
  CHECK(generate(*session, true, [&] { *session = Session(engine); }) == expected);
  CHECK(session->lengths() == std::vector<int>{0});
}

TEST_CASE("a session that was moved from is refused") {
  const Engine engine(stand_in::toy_model());
  Session session(engine);
  const Session taken = std::move(session);
  for (const Use& use : uses()) {
    CAPTURE(use.name);
    CHECK_THROWS_WITH_AS(use.call(session), "this session was moved to another one; use that",
                         Error);  // NOLINT(bugprone-use-after-move)
  }
}
