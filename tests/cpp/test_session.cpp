#include <doctest/doctest.h>

#include <algorithm>
#include <optional>
#include <random>

#include "qwenport/qwenport.hpp"
#include "stand_in.hpp"

using qwenport::Engine;
using qwenport::ErrorCode;
using qwenport::Session;
using qwenport::SessionOptions;
using qwenport::Token;
using Rows = std::vector<std::vector<Token>>;

namespace {

template <typename Work>
std::optional<ErrorCode> code_of(const Work& work) {
  try {
    work();
  } catch (const qwenport::Error& error) {
    CHECK(std::string(error.what()).find('\n') == std::string::npos);
    return error.code();
  }
  return std::nullopt;
}

/// Checks a call's logits against the definition of the network, given all tokens that the rows hold.
void check_logits(const qwenport::detail::Manifest& manifest, const qwenport::Logits& logits,
                  const Rows& held, const std::vector<char>& fed) {
  for (std::size_t b = 0; b < fed.size(); ++b) {
    const float* row = logits.row(static_cast<int>(b));
    REQUIRE((row != nullptr) == (fed[b] != 0));
    if (row == nullptr) continue;
    const auto expected = stand_in::toy_logits(manifest, held[b]);
    REQUIRE(std::equal(expected.begin(), expected.end(), row));
  }
}

struct Setting {
  int capacity;
  int max_step_tokens;
  bool cuda_graphs;
  std::string form = "masked";
  bool two_profiles = false;
};

void random_operations(unsigned seed, const Setting& setting) {
  std::mt19937 random(seed);
  const auto below = [&random](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  const auto model = stand_in::toy_model(160, 4, setting.max_step_tokens, setting.form, setting.two_profiles);
  const Engine engine(model);
  SessionOptions options;
  options.max_batch = 1 + below(4);
  options.capacity = setting.capacity;
  options.cuda_graphs = setting.cuda_graphs;
  Session session(engine, options);
  const auto rows = static_cast<std::size_t>(options.max_batch);
  Rows held(rows);
  std::vector<std::byte> saved;
  Rows saved_rows;
  for (int operation = 0; operation < 60; ++operation) {
    const int kind = below(20);
    const auto some = 1 + static_cast<std::size_t>(below(options.max_batch));
    if (kind < 5) {
      Rows given(some);
      bool fits = true;
      for (std::size_t b = 0; b < some; ++b) {
        given[b].resize(static_cast<std::size_t>(below(3) == 0 ? 0 : below(setting.capacity)));
        for (Token& token : given[b]) token = below(97);
        fits = fits && held[b].size() + given[b].size() <= static_cast<std::size_t>(setting.capacity);
      }
      if (!fits) {
        REQUIRE(code_of([&] { session.prefill_batch(given); }) == ErrorCode::capacity);
        continue;
      }
      std::vector<char> fed;
      for (std::size_t b = 0; b < some; ++b) {
        held[b].insert(held[b].end(), given[b].begin(), given[b].end());
        fed.push_back(static_cast<char>(!given[b].empty()));
      }
      check_logits(model->manifest(), session.prefill_batch(given), held, fed);
    } else if (kind < 15) {
      std::vector<Token> given;
      std::vector<char> fed;
      for (std::size_t b = 0; b < some; ++b) {
        const bool full = held[b].size() == static_cast<std::size_t>(setting.capacity);
        given.push_back(full || below(4) == 0 ? qwenport::idle : below(97));
        fed.push_back(static_cast<char>(given[b] != qwenport::idle));
        if (fed[b] != 0) held[b].push_back(given[b]);
      }
      check_logits(model->manifest(), session.decode_batch(given), held, fed);
    } else if (kind == 15) {
      const auto b = static_cast<std::size_t>(below(options.max_batch));
      held[b].resize(static_cast<std::size_t>(below(static_cast<int>(held[b].size()) + 1)));
      session.truncate(static_cast<int>(held[b].size()), static_cast<int>(b));
    } else if (kind == 16) {
      session.reset();
      for (auto& row : held) row.clear();
    } else if (kind == 17) {
      saved = session.save();
      saved_rows = held;
    } else if (kind == 18 && !saved.empty()) {
      if (below(2) == 0) session = Session(engine, options);  // in another session as well as in this one
      session.restore(saved);
      held = saved_rows;
    }
    const auto lengths = session.lengths();
    for (std::size_t b = 0; b < rows; ++b) REQUIRE(lengths[b] == static_cast<int>(held[b].size()));
  }
}

}  // namespace

TEST_CASE("whatever was done before, logits are those of the tokens that the row holds") {
  for (unsigned seed = 0; seed < 40; ++seed) {
    CAPTURE(seed);
    random_operations(seed, {160, 24, true});
    random_operations(seed, {160, 160, false});
    random_operations(seed, {20, 24, seed % 2 == 0});
    random_operations(seed, {1, 1, true});
    random_operations(seed, {160, 24, true, "direct", true});
    random_operations(seed, {150, 24, seed % 2 == 0, "chunked", false});
    random_operations(seed, {160, 24, true, "split", true});
    random_operations(seed, {20, 24, false, "split", true});
  }
}

TEST_CASE("a step waits for the device once and allocates nothing on it") {
  const auto model = stand_in::toy_model(160, 4, 24);
  for (const bool graphs : {true, false}) {
    Session session(Engine(model), {4, 0, graphs});
    auto& counts = model->counts();
    const long waited = counts.synchronisations - counts.steps;
    const long allocated = counts.device_allocations;
    session.prefill_batch({{1, 2, 3}, std::vector<Token>(50, 7), {}, {4}});
    for (Token token = 0; token < 97; ++token) session.decode_batch({token, token, qwenport::idle, token});
    CHECK(counts.synchronisations - counts.steps == waited);
    CHECK(counts.device_allocations == allocated);
  }
}

TEST_CASE("only logits that are asked for are copied") {
  const auto model = stand_in::toy_model(160, 4, 24);
  for (const bool graphs : {true, false}) {
    Session session(Engine(model), {4, 0, graphs});
    auto& copied = model->counts().bytes_to_host;
    const auto rows_copied = [&copied](const auto& work) {
      const long before = copied;
      work();
      return (copied - before) / static_cast<long>(97 * sizeof(float));
    };
    // 50 tokens take three steps; the row of 3 ends in the first, the others in the last
    const Rows prompts{{1, 2, 3}, std::vector<Token>(50, 7), {}, std::vector<Token>(49, 7)};
    CHECK(rows_copied([&] { session.prefill_batch(prompts); }) == 3);
    for (int i = 0; i < 4; ++i) {
      CHECK(rows_copied([&] { session.decode_batch({1, qwenport::idle, 3, 4}); }) == 3);
      CHECK(rows_copied([&] { session.decode_batch({1}); }) == 1);
    }
  }
}

TEST_CASE("the workspace is that of the session's own shapes") {
  const auto model = stand_in::toy_model(160, 4, 24);
  const auto bytes_of = [&model](int rows, int capacity) {
    const Session session(Engine(model), {rows, capacity, true});
    const long cache = 4L * rows * 160 * 2 * 4 * 4;
    return model->counts().device_bytes - cache;
  };
  CHECK(bytes_of(1, 0) < bytes_of(4, 0) / 3);
  CHECK(bytes_of(4, 24) < bytes_of(4, 0) / 2);
}

TEST_CASE("a step that needs a larger workspace than expected gets it") {
  for (const bool graphs : {true, false}) {
    const auto model = stand_in::toy_model(160, 2, 24, "masked", true);
    auto& counts = model->counts();
    counts.odd_workspace = 100000;
    Session session(Engine(model), {2, 0, graphs});
    const long before = counts.device_bytes;
    Rows held{{1, 2}, {3}};
    session.prefill_batch(held);
    const auto decode = [&](Token token) {
      held[0].push_back(token);
      held[1].push_back(token + 1);
      check_logits(model->manifest(), session.decode_batch({token, token + 1}), held, {1, 1});
    };
    for (Token token = 0; token < 96; ++token) {
      decode(token);
      if (token % 10 == 0) {  // prefill needs no more, and shares what has grown
        held[0].insert(held[0].end(), {7, 8});
        check_logits(model->manifest(), session.prefill_batch({{7, 8}, {}}), held, {1, 0});
      }
    }
    CHECK(counts.device_bytes > before + 50000);
    CHECK(counts.captures ==
          (graphs ? 2 : 0));  // that of 64 slots had the old workspace, and is not needed again
    CHECK(session.cuda_graphs() == graphs);
  }
}

TEST_CASE("attention by lengths has one graph for all of them") {
  const auto model = stand_in::toy_model(512, 2, 24, "direct", true);
  Session session(Engine(model), {2, 0, true});
  auto& counts = model->counts();
  for (int i = 0; i < 256; ++i) session.decode_batch({1, 2});
  CHECK(counts.captures == 1);
  CHECK(counts.launches == 255);
  for (int i = 0; i < 100; ++i) session.decode(1);
  CHECK(counts.captures == 2);       // one for each number of rows
  CHECK(counts.executors == 2 + 2);  // one for each profile
}

TEST_CASE("decoding captures a graph for each span and replays it") {
  const auto model = stand_in::toy_model(512, 2, 24);
  Session session(Engine(model), {2, 0, true});
  auto& counts = model->counts();
  for (int i = 0; i < 256; ++i) session.decode_batch({1, 2});
  CHECK(counts.steps == 256);
  CHECK(counts.captures == 4);        // spans 64, 128, 192, 256
  CHECK(counts.launches == 256 - 4);  // the first step of each runs without
  CHECK(counts.executors == 1 + 4);
  CHECK(session.cuda_graphs());
  session.reset();
  for (int i = 0; i < 64; ++i) session.decode_batch({3, 4});
  CHECK(counts.captures == 4);  // the graph of span 64 is still there
  CHECK(counts.launches == 256 - 4 + 64);
}

TEST_CASE("no more than eight graphs are kept, and the one unused for longest goes") {
  const auto model = stand_in::toy_model(1024, 1, 24);
  Session session(Engine(model), {1, 0, true});
  auto& counts = model->counts();
  for (int i = 0; i < 1024; ++i) session.decode(5);
  CHECK(counts.captures == 13);  // spans 64 to 576 by 64, 704, 832, 960, 1024
  session.truncate(1000);
  session.decode(5);
  CHECK(counts.captures == 13);  // span 1024 is one of the last eight
  session.reset();
  session.decode(5);
  session.decode(5);
  CHECK(counts.captures == 14);  // span 64 is not
}

TEST_CASE("a graph that was used lately stays, however old it is") {
  const auto model = stand_in::toy_model(1024, 1, 24);
  Session session(Engine(model), {1, 0, true});
  auto& counts = model->counts();
  for (int i = 0; i < 512; ++i) session.decode(5);  // eight spans
  session.reset();
  session.decode(5);  // the first of them again
  session.prefill(std::vector<Token>(520, 5));
  session.decode(5);
  session.decode(5);  // a ninth takes the place of the second
  CHECK(counts.captures == 9);
  session.reset();
  session.decode(5);
  session.decode(5);
  CHECK(counts.captures == 9);
  session.prefill(std::vector<Token>(70, 5));
  session.decode(5);
  session.decode(5);
  CHECK(counts.captures == 10);
}

TEST_CASE("where the device refuses a graph, the session goes on without") {
  for (const bool refuse_capture : {true, false}) {
    for (const int graphs_before : {0, 1}) {
      const auto model = stand_in::toy_model(160, 2, 24);
      Session session(Engine(model), {2, 0, true});
      auto& counts = model->counts();
      Rows held(2);
      const auto decode = [&](Token token) {
        held[0].push_back(token);
        held[1].push_back(token + 1);
        check_logits(model->manifest(), session.decode_batch({token, token + 1}), held, {1, 1});
      };
      if (graphs_before == 1) {  // one span has its graph; it is the next span's that is refused
        for (Token token = 0; token < 60; ++token) decode(token);
        REQUIRE(counts.captures == 1);
      }
      if (refuse_capture) {
        counts.no_captures = true;
      } else {
        counts.most_executors = counts.executors.load();
      }
      for (Token token = 0; token < 70; ++token) decode(token);
      CHECK_FALSE(session.cuda_graphs());
      CHECK(counts.captures == graphs_before);
      session.reset();
      held = Rows(2);
      for (Token token = 0; token < 10; ++token) decode(token);
      CHECK(counts.captures == graphs_before);
    }
  }
}

TEST_CASE("what the device refuses while nothing can be done without it is an error") {
  const auto model = stand_in::toy_model(160, 2, 24);
  model->counts().most_executors = 0;
  CHECK(code_of([&] { Session{Engine(model)}; }) == ErrorCode::device);
}

TEST_CASE("TensorRT-RTX has no graphs") {
  std::string text = stand_in::toy_manifest_text(160, 2, 24);
  text.replace(text.find("\"tensorrt\""), 10, "\"tensorrt-rtx\"");
  const auto manifest = qwenport::detail::parse_manifest(text, "toy");
  const auto model = std::make_shared<const stand_in::StandInModel>(
      manifest, [&manifest] { return stand_in::toy_network(manifest); });
  Session session(Engine(model), {1, 0, true});
  for (int i = 0; i < 5; ++i) session.decode(5);
  CHECK_FALSE(session.cuda_graphs());
  CHECK(model->counts().captures == 0);
}

TEST_CASE("without graphs nothing is captured") {
  const auto model = stand_in::toy_model(160, 2, 24);
  Session session(Engine(model), {1, 0, false});
  for (int i = 0; i < 100; ++i) session.decode(5);
  CHECK(model->counts().captures == 0);
  CHECK(model->counts().executors == 1);
}

TEST_CASE("decoding allocates no host memory once its graph is there") {
  const auto model = stand_in::toy_model(160, 3, 24);
  for (const bool graphs : {true, false}) {
    Session session(Engine(model), {3, 0, graphs});
    const std::vector<Token> tokens{1, qwenport::idle, 3};
    session.decode_batch(tokens);
    session.decode_batch(tokens);
    const long before = stand_in::allocations;
    for (int i = 2; i < 64; ++i) session.decode_batch(tokens);
    CHECK(stand_in::allocations == before);
  }
}

TEST_CASE("all memory is given back") {
  const auto model = stand_in::toy_model(160, 3, 24);
  {
    Session session(Engine(model), {3, 0, true});
    session.prefill({1, 2, 3});
    CHECK(model->counts().device_bytes > 0);
  }
  CHECK(model->counts().device_bytes == 0);
}

TEST_CASE("what cannot be done is refused by name, and the session goes on") {
  const auto model = stand_in::toy_model(160, 2, 24);
  const Engine engine(model);
  CHECK(code_of([&] { Session(engine, {3, 0, true}); }) == ErrorCode::invalid_argument);
  CHECK(code_of([&] { Session(engine, {0, 0, true}); }) == ErrorCode::invalid_argument);
  CHECK(code_of([&] { Session(engine, {1, 161, true}); }) == ErrorCode::invalid_argument);
  CHECK(code_of([&] { Session(engine, {1, -1, true}); }) == ErrorCode::invalid_argument);
  Session session(engine, {2, 10, true});
  CHECK(session.capacity() == 10);
  CHECK(session.max_batch() == 2);
  session.prefill({1, 2, 3, 4, 5, 6, 7, 8, 9});
  CHECK(code_of([&] { session.prefill({97}); }) == ErrorCode::invalid_argument);
  CHECK(code_of([&] { session.prefill({-1}); }) == ErrorCode::invalid_argument);
  CHECK(code_of([&] { session.decode(-2); }) == ErrorCode::invalid_argument);
  CHECK(code_of([&] { session.decode_batch({1, 2, 3}); }) == ErrorCode::invalid_argument);
  CHECK(code_of([&] { session.prefill_batch({}); }) == ErrorCode::invalid_argument);
  CHECK(code_of([&] { session.prefill({1, 2}); }) == ErrorCode::capacity);
  CHECK(code_of([&] { session.truncate(10); }) == ErrorCode::invalid_argument);
  CHECK(code_of([&] { session.truncate(-1); }) == ErrorCode::invalid_argument);
  CHECK(code_of([&] { session.truncate(0, 2); }) == ErrorCode::invalid_argument);
  const auto logits = session.decode(10);
  CHECK(code_of([&] { (void)logits.row(1); }) == ErrorCode::invalid_argument);
  check_logits(model->manifest(), logits, {{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}}, {1});
  CHECK(code_of([&] { session.decode(11); }) == ErrorCode::capacity);
}

TEST_CASE("after a step that failed on the device a session refuses to go on") {
  const auto manifest = qwenport::detail::parse_manifest(stand_in::toy_manifest_text(), "toy");
  const auto model = std::make_shared<const stand_in::StandInModel>(manifest, [] {
    return stand_in::Network(
        [](const stand_in::Call&) { throw qwenport::Error(ErrorCode::device, "broken"); });
  });
  Session session{Engine(model)};
  CHECK(code_of([&] { session.prefill({1}); }) == ErrorCode::device);
  CHECK(code_of([&] { session.prefill({1}); }) == ErrorCode::device);
  CHECK(code_of([&] { (void)session.save(); }) == ErrorCode::device);
  CHECK(code_of([&] { session.generate({1}); }) == ErrorCode::device);
}

TEST_CASE("a snapshot that is damaged, or another's, is refused and changes nothing") {
  const auto model = stand_in::toy_model(160, 2, 24);
  const Engine engine(model);
  Session session(engine, {2, 0, true});
  session.prefill_batch({{1, 2, 3}, {4}});
  const auto snapshot = session.save();
  std::mt19937 random(1);
  for (int i = 0; i < 200; ++i) {
    auto damaged = snapshot;
    damaged[random() % damaged.size()] ^= std::byte{1} << (random() % 8);
    REQUIRE(code_of([&] { session.restore(damaged); }) == ErrorCode::bad_snapshot);
    damaged = snapshot;
    damaged.resize(random() % damaged.size());
    REQUIRE(code_of([&] { session.restore(damaged); }) == ErrorCode::bad_snapshot);
  }
  Session fewer_rows(engine, {1, 0, true});
  CHECK(code_of([&] { fewer_rows.restore(snapshot); }) == ErrorCode::bad_snapshot);
  Session fewer_slots(engine, {2, 2, true});
  CHECK(code_of([&] { fewer_slots.restore(snapshot); }) == ErrorCode::capacity);
  std::string other = stand_in::toy_manifest_text(160, 2, 24);
  other.replace(other.find("ba7816"), 6, "000000");
  const auto manifest = qwenport::detail::parse_manifest(other, "toy");
  Session another(Engine(std::make_shared<const stand_in::StandInModel>(
                      manifest, [&manifest] { return stand_in::toy_network(manifest); })),
                  {2, 0, true});
  CHECK(code_of([&] { another.restore(snapshot); }) == ErrorCode::bad_snapshot);
  check_logits(model->manifest(), session.decode_batch({9, 9}), {{1, 2, 3, 9}, {4, 9}}, {1, 1});
}

TEST_CASE("a full row, restored or not, keeps its slots while others go on") {
  const auto model = stand_in::toy_model(20, 2, 20);
  const Engine engine(model);
  Session session(engine, {2, 0, true});
  std::vector<Token> full(20);
  for (std::size_t i = 0; i < full.size(); ++i) full[i] = static_cast<Token>(i);
  session.prefill_batch({full, {5}});
  const auto snapshot = session.save();
  Session restored(engine, {2, 0, true});
  restored.restore(snapshot);
  for (Session* one : {&session, &restored}) {
    one->decode_batch({qwenport::idle, 5});
    one->truncate(1, 1);
    CHECK(one->save() == snapshot);
  }
}

TEST_CASE("a row cut short, saved and restored as a full one keeps its last slot") {
  const auto model = stand_in::toy_model(160, 2, 24);
  const Engine engine(model);
  Session large(engine, {2, 0, true});
  large.prefill_batch({{1, 2, 3, 4, 5, 6}, {7}});
  large.truncate(4);
  Session small(engine, {2, 4, true});
  small.restore(large.save());
  check_logits(model->manifest(), small.decode_batch({qwenport::idle, 8}), {{}, {7, 8}}, {0, 1});
  Session again(engine, {2, 0, true});
  again.restore(small.save());
  check_logits(model->manifest(), again.decode_batch({9, 9}), {{1, 2, 3, 4, 9}, {7, 8, 9}}, {1, 1});
}
