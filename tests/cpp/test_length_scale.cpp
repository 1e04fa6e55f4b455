// Sessions, generations and chats of a model with dual chunk attention: the toy network tells for which length each key was
// scaled, and the stand-in refuses steps that are too wide.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>

#include "chat_script.hpp"
#include "spans.hpp"
#include "stand_in.hpp"

namespace {

using qwenport::Engine;
using qwenport::Error;
using qwenport::ErrorCode;
using qwenport::Session;
using qwenport::SessionOptions;
using qwenport::Token;
using stand_in::Stage;
using Tokens = std::vector<Token>;
using Rows = std::vector<Tokens>;

constexpr int unscaled = 40;

Tokens counting(std::size_t count) {
  Tokens tokens(count);
  for (std::size_t i = 0; i < count; ++i) tokens[i] = static_cast<Token>(i % 97);
  return tokens;
}

std::string refused(const std::function<void()>& work) {
  try {
    work();
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::invalid_argument);
    return error.what();
  }
  return "";
}

/// What the rows of a session must hold.
struct Model {
  const qwenport::detail::Manifest& manifest;
  Rows tokens;
  Rows requests;  // for each token

  [[nodiscard]] static Token counted(std::size_t request) {
    return std::max<Token>(unscaled, static_cast<Token>(request));
  }
  [[nodiscard]] bool takes(std::size_t row, std::size_t request) const {
    return std::all_of(requests[row].begin(), requests[row].end(),
                       [request](Token one) { return one == counted(request); });
  }
  void add(std::size_t row, const Tokens& given, std::size_t request) {
    tokens[row].insert(tokens[row].end(), given.begin(), given.end());
    requests[row].resize(tokens[row].size(), counted(request));
  }
  void cut(std::size_t row, std::size_t length) {
    tokens[row].resize(length);
    requests[row].resize(length);
  }
  void check(const qwenport::Logits& logits, std::size_t row) const {
    const float* const found = logits.row(static_cast<int>(row));
    REQUIRE(found != nullptr);
    const auto expected = stand_in::toy_logits(manifest, tokens[row], requests[row]);
    REQUIRE(std::equal(expected.begin(), expected.end(), found));
  }
};

void random_operations(unsigned seed, int capacity, bool cuda_graphs) {
  std::mt19937 random(seed);
  const auto below = [&random](std::size_t n) { return random() % n; };
  const auto model = stand_in::toy_model_of(
      stand_in::with_dual_chunk(stand_in::toy_manifest_text(160, 3, 24, 97), unscaled));
  const Engine engine(model);
  const std::size_t rows = 1 + below(3);
  const SessionOptions options{static_cast<int>(rows), capacity, cuda_graphs};
  Session session(engine, options);
  const auto most = static_cast<std::size_t>(capacity);
  Model held{model->manifest(), Rows(rows), Rows(rows)};
  std::vector<std::byte> saved;
  Model kept = held;
  for (int operation = 0; operation < 60; ++operation) {
    const std::size_t kind = below(12);
    if (kind < 4) {  // prompts, in pieces
      Rows prompts(rows);
      std::vector<int> lengths;
      bool fits = true;
      for (std::size_t b = 0; b < rows; ++b) {
        const std::size_t room = most - held.tokens[b].size();
        if (below(3) != 0 && room != 0) prompts[b] = counting(1 + below(room));
        lengths.push_back(static_cast<int>(held.tokens[b].size() + prompts[b].size()));
        fits = fits && (prompts[b].empty() || held.takes(b, static_cast<std::size_t>(lengths[b])));
      }
      const std::size_t piece = 1 + below(most);
      for (std::size_t start = 0; start < most; start += piece) {
        Rows given(rows);
        for (std::size_t b = 0; b < rows; ++b) {
          const auto at = [&](std::size_t end) {
            return prompts[b].begin() + static_cast<std::ptrdiff_t>(std::min(end, prompts[b].size()));
          };
          given[b] = Tokens(at(start), at(start + piece));
        }
        if (!fits) {
          REQUIRE(refused([&] { session.prefill_batch(given, lengths); }).find("reset the row") !=
                  std::string::npos);
          break;
        }
        const auto logits = session.prefill_batch(given, lengths);
        for (std::size_t b = 0; b < rows; ++b) {
          if (given[b].empty()) continue;
          held.add(b, given[b], static_cast<std::size_t>(lengths[b]));
          held.check(logits, b);
        }
      }
    } else if (kind < 9) {
      Tokens given;
      for (std::size_t b = 0; b < rows; ++b) {
        const bool full = held.tokens[b].size() == most;
        given.push_back(full || below(4) == 0 ? qwenport::idle : static_cast<Token>(below(97)));
      }
      bool fits = true;  // a row that was cut within a scaled prompt takes no single tokens
      for (std::size_t b = 0; b < rows; ++b) {
        const Tokens& requests = held.requests[b];
        fits =
            fits && (given[b] == qwenport::idle || requests.empty() ||
                     requests.back() <= std::max<Token>(unscaled, static_cast<Token>(requests.size()) + 1));
      }
      if (!fits) {
        REQUIRE(refused([&] { session.decode_batch(given); }).find("reset the row") != std::string::npos);
        continue;
      }
      const auto logits = session.decode_batch(given);
      for (std::size_t b = 0; b < rows; ++b) {
        if (given[b] == qwenport::idle) continue;
        held.add(b, {given[b]}, held.tokens[b].size() + 1);
        held.check(logits, b);
      }
    } else if (kind == 9) {
      const std::size_t b = below(rows);
      held.cut(b, below(3) == 0 ? 0 : below(held.tokens[b].size() + 1));
      session.truncate(static_cast<int>(held.tokens[b].size()), static_cast<int>(b));
    } else if (kind == 10) {
      saved = session.save();
      kept.tokens = held.tokens;
      kept.requests = held.requests;
    } else if (!saved.empty()) {
      if (below(2) == 0) session = Session(engine, options);
      session.restore(saved);
      held.tokens = kept.tokens;
      held.requests = kept.requests;
    }
  }
}

}  // namespace

TEST_CASE("whatever was done before, each key is scaled for its own request") {
  for (unsigned seed = 0; seed < 60; ++seed) {
    CAPTURE(seed);
    random_operations(seed, 160, true);
    random_operations(seed, 70, seed % 2 == 0);
    random_operations(seed, unscaled, false);
  }
}

TEST_CASE("a prompt of one call states its length by itself, and lengths that cannot be are refused") {
  const Engine engine(
      stand_in::toy_model_of(stand_in::with_dual_chunk(stand_in::toy_manifest_text(160, 2), unscaled)));
  Session session(engine, {2, 100, true});
  CHECK(refused([&] { session.prefill_batch({{1}, {2}}, {1}); }) == "1 prompt lengths for 2 rows");
  CHECK(refused([&] { session.prefill({1, 2}, 1); }) ==
        "row 0: a prompt of 1 tokens, where 2 to 100 are possible");
  CHECK(refused([&] { session.prefill_batch({{}, {2}}, {0, 101}); }) ==
        "row 1: a prompt of 101 tokens, where 1 to 100 are possible");
  CHECK(session.lengths() == std::vector<int>{0, 0});
  session.prefill_batch({{}, {2}}, {-7, 60});  // a row that is given nothing may say anything
  CHECK(refused([&] { session.prefill_batch({{}, {2}}); }) ==
        "row 1 holds keys that are scaled for a request of 60 positions, and this request has 2: lengths "
        "beyond 40 "
        "scale keys; reset the row and give it the whole prompt");
  session.prefill_batch({counting(60), {2}}, {60, 60});
  CHECK(session.lengths() == std::vector<int>{60, 2});
}

TEST_CASE("a full row that idles writes its last key again as it was") {
  const auto model = stand_in::toy_model_of(
      stand_in::with_dual_chunk(stand_in::toy_manifest_text(160, 2, 24, 97), unscaled));
  const Engine engine(model);
  Session session(engine, {2, 60, true});
  Model held{model->manifest(), Rows(2), Rows(2)};
  session.prefill_batch({counting(60), {5}});
  held.add(0, counting(60), 60);
  session.prefill_batch({{}, {6, 7}}, {1, 3});
  Session longer(engine, {2, 100, true});
  longer.restore(session.save());
  held.add(0, {9}, 61);
  held.check(longer.decode_batch({9}), 0);
}

TEST_CASE("a generation states the length of its prompts, and one that appends is refused beyond it") {
  for (const int width : {16, 160}) {
    const auto model = stand_in::toy_model_of(
        stand_in::with_dual_chunk(stand_in::toy_manifest_text(160, 2, width, 97), unscaled));
    Session session{Engine(model), {2, 0, true}};
    Session whole{Engine(model), {2, 0, true}};
    qwenport::GenerateOptions options;
    options.max_new_tokens = 6;
    const auto made = session.generate_batch({counting(70), counting(9)}, options);
    std::size_t row = 0;
    for (const std::size_t length : {70, 9}) {
      Model held{model->manifest(), Rows(2), Rows(2)};
      held.add(0, counting(length), length);
      held.check(whole.prefill(counting(length)), 0);
      for (const Token token : made[row].tokens) {
        const auto logits = stand_in::toy_logits(held.manifest, held.tokens[0], held.requests[0]);
        CHECK(std::max_element(logits.begin(), logits.end()) - logits.begin() == token);
        held.add(0, {token}, held.tokens[0].size() + 1);
      }
      whole.reset();
      ++row;
    }
    options.append = true;
    CHECK(refused([&] { session.generate(made[0].pending, options); }).find("reset the row") !=
          std::string::npos);
    CHECK(session.lengths() == std::vector<int>{75, 14});
    CHECK(session.generate_batch({}, options).empty());
  }
}

TEST_CASE("up to the original length a generation appends") {
  const auto model =
      stand_in::toy_model_of(stand_in::with_dual_chunk(stand_in::toy_manifest_text(160, 1), unscaled));
  Session session{Engine(model)};
  qwenport::GenerateOptions options;
  options.max_new_tokens = 10;
  const auto first = session.generate(counting(20), options);
  options.append = true;
  session.generate(first.pending, options);
  CHECK(session.lengths() == std::vector<int>{39});
}

TEST_CASE("a snapshot with impossible lengths is refused") {
  const auto model =
      stand_in::toy_model_of(stand_in::with_dual_chunk(stand_in::toy_manifest_text(160, 1), unscaled));
  Session session{Engine(model)};
  session.prefill({1, 2, 3});
  const auto saved = session.save();
  for (const std::int64_t length : {0, unscaled - 1, 161}) {
    auto damaged = saved;
    // after magic, version, identity and rows: a length, three tokens, three lengths of requests
    std::memcpy(damaged.data() + 8 + 8 + 64 + 8 + 8 + 24 + 8, &length, sizeof length);
    std::uint64_t state = damaged.size() - 8;  // the checksum of snapshot.cpp
    for (std::size_t at = 0; at < damaged.size() - 8; at += 8) {
      std::uint64_t next = 0;
      std::memcpy(&next, damaged.data() + at, std::min<std::size_t>(8, damaged.size() - 8 - at));
      state = (state ^ next) * 0x9E3779B97F4A7C15;
      state ^= state >> 32U;
    }
    std::memcpy(damaged.data() + damaged.size() - 8, &state, sizeof state);
    try {
      session.restore(damaged);
      FAIL("no error");
    } catch (const Error& error) {
      CHECK(std::string(error.what()) == "snapshot: damaged");
    }
  }
  session.restore(saved);
}

TEST_CASE("steps narrow as the span grows, within memory that the session has from its beginning") {
  constexpr std::int64_t score_bytes = 40L * 65536;  // so many that a few tokens have scores of 1 GiB
  constexpr std::int64_t most_bytes = 1073741824;
  const std::vector<qwenport::detail::Profile> profiles{{1, 1, 160}, {2, 24, 64}, {2, 7, 128}};
  for (const int rows : {1, 3}) {
    for (const bool by_profiles : {false, true}) {
      auto text =
          stand_in::with_dual_chunk(stand_in::toy_manifest_text(160, rows, 24, 97, "masked", true), unscaled);
      if (by_profiles) text = stand_in::with_profiles(text, rows, profiles);
      const auto model = stand_in::toy_model_of(text, by_profiles ? 0 : score_bytes);
      Session session{Engine(model), {rows, 0, true}};
      const auto fits = [&](std::int64_t width, std::int64_t span) {
        if (!by_profiles) return rows * width * span * score_bytes <= most_bytes;
        return span <= 64 ? width <= 24 : span <= 128 && width <= 7;
      };
      auto& counts = model->counts();
      const long reserved = counts.device_bytes;
      const long allocated = counts.device_allocations;
      session.prefill_batch(Rows(static_cast<std::size_t>(rows), counting(160)));
      long steps = 0;
      for (std::int64_t start = 0; start < 160; ++steps) {
        std::int64_t width = std::min<std::int64_t>(24, 160 - start);
        while (width > 1 && !fits(width, qwenport::detail::span_holding(start + width, 64, 160))) {
          width = (width + 1) / 2;
        }
        start += width;
      }
      CHECK(counts.steps == steps);
      CHECK(steps > 160 / 6);
      CHECK(counts.device_bytes == reserved);
      CHECK(counts.device_allocations == allocated);
    }
  }
}

TEST_CASE("a chat begins again when its conversation is longer than the original length") {
  Stage stage(unscaled);
  qwenport::Chat chat(stage.engine, stage.scripted());
  const Tokens turn = stage.encode("<|x|>u q<|x|>a ");  // 7 tokens
  Tokens said;
  std::vector<int> fed;
  for (const std::size_t letters : {5, 6, 17, 1, 1}) {  // the third reply crosses the length
    stage.script.next = Tokens(letters, 'k');
    said.insert(said.end(), turn.begin(), turn.end());
    const auto history = chat.history().size();
    try {
      chat.send("q", [](std::string_view) { throw std::runtime_error("not that"); });
      FAIL("no exception");
    } catch (const std::runtime_error& error) {
      CHECK(std::string(error.what()) == "not that");
      CHECK(chat.history().size() == history);
    }
    const auto reply = chat.send("q");
    CHECK(reply.text == std::string(letters, 'k'));
    CHECK(stage.script.followed(stage.engine, said));
    fed.push_back(reply.prompt_tokens);
    said.insert(said.end(), stage.script.next.begin(), stage.script.next.end());
  }
  CHECK(fed == std::vector<int>{7, 7, 7, 56, 64});
}
