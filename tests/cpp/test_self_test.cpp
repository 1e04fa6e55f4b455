// The self-test against the stand-in: a healthy network passes, and every fault is found where it is.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <thread>

#include "proof_file.hpp"
#include "self_test.hpp"
#include "session.hpp"
#include "stand_in.hpp"

using qwenport::ErrorCode;
using qwenport::SelfTestReport;
using qwenport::Token;
using qwenport::detail::Manifest;
using qwenport::detail::Proof;
using stand_in::Call;
using stand_in::Network;
using stand_in::ProofFile;

namespace {

std::vector<Token> text(std::size_t length, Token first) {
  std::vector<Token> tokens(length);
  for (std::size_t i = 0; i < length; ++i) tokens[i] = (first + static_cast<Token>(i * i)) % 97;
  return tokens;
}

/// Prefill in one step and in several, decode, ragged rows, span edges, truncation, restart, a poisoned cache.
ProofFile proof_file() {
  ProofFile file;
  file.sequences = {text(140, 3), text(20, 50), text(20, 7), text(20, 11)};
  // another text after the same five tokens
  for (std::size_t i = 0; i < 5; ++i) file.sequences[1][i] = file.sequences[0][i];
  file.begin("decode", 1, 12);
  for (const int end : {1, 2, 3, 8, 9, 10}) file.feed({{0, 0, end}});
  file.begin("poisoned", 1, 40);
  file.poison();
  file.feed({{0, 0, 20}});
  file.poison();
  for (const int end : {21, 22, 23}) file.feed({{0, 0, end}});
  file.begin("truncate", 1, 20);
  file.feed({{0, 0, 10}});
  file.truncate(0, 5);
  file.feed({{0, 1, 9}});
  file.reset();
  file.feed({{0, 1, 3}});
  file.begin("ragged rows", 3, 20);
  file.feed({{0, 1, 3}, {1, 2, 9}, {2, 3, 1}});
  file.feed({{0, 1, 4}, {2, 3, 2}});
  file.feed({{0, 1, 5}, {1, 2, 10}, {2, 3, 3}});
  file.feed({{1, 2, 11}});
  file.begin("span edges", 1, 140);
  file.feed({{0, 0, 63}});
  for (const int end : {64, 65, 66, 128, 129, 130}) file.feed({{0, 0, end}});
  file.reset();
  file.feed({{0, 0, 140}});
  file.begin("more rows than there are", 5, 20);
  file.feed({{4, 1, 2}});
  return file;
}

constexpr int cases = 5;
constexpr int steps = 25;
constexpr int marks = 30;

std::string bytes_of(const ProofFile& file, const Manifest& manifest) {
  return file.bytes([&](const std::vector<Token>& tokens) { return stand_in::toy_logits(manifest, tokens); });
}

const Manifest& manifest() {
  static const Manifest one = qwenport::detail::parse_manifest(stand_in::toy_manifest_text(), "toy");
  return one;
}

/// A model whose every network is `make()`.
std::shared_ptr<const stand_in::StandInModel> model_of(const std::function<Network()>& make) {
  return std::make_shared<const stand_in::StandInModel>(manifest(), make);
}

SelfTestReport tested(const std::function<Network()>& make, const ProofFile& file = proof_file()) {
  const Proof proof(bytes_of(file, manifest()), "proof", manifest().info.vocab_size);
  return qwenport::detail::run_proof(model_of(make), proof, "engine");
}

float* logits_of(const Call& call, std::int64_t row) {
  return static_cast<float*>(call.memory.at("logits")) + row * manifest().info.vocab_size;
}

/// The number at the beginning of a slot of a cache.
float& slot_of(const Call& call, std::int64_t row, std::int64_t slot) {
  auto* cache = static_cast<float*>(call.memory.at(manifest().caches.front().past));
  return cache[(row * manifest().kv_heads * manifest().info.capacity + slot) * manifest().head_dim];
}

std::int64_t last_position(const Call& call, std::int64_t row) {
  return call.ints("position_ids")[row * call.width() + call.ints("logits_indices")[row]];
}

/// The toy network with something done before and after a step.
std::function<Network()> with(const std::function<void(const Call&)>& before,
                              const std::function<void(const Call&)>& after) {
  return [=] {
    const Network healthy = stand_in::toy_network(manifest());
    return [=](const Call& call) {
      if (before) before(call);
      healthy(call);
      if (after) after(call);
    };
  };
}

std::function<Network()> after(const std::function<void(const Call&)>& change) {
  return with(nullptr, change);
}

void each_row(const Call& call, const std::function<void(std::int64_t row, float* logits)>& visit) {
  for (std::int64_t b = 0; b < call.rows(); ++b) visit(b, logits_of(call, b));
}

/// A slot after the last one leaks into the logits: nothing, as long as it is zero.
void read_past_the_end(const Call& call) {
  each_row(call, [&](std::int64_t b, float* logits) {
    const std::int64_t next = call.ints("write_indices")[b] + call.width();
    if (next < manifest().info.capacity) logits[5] += slot_of(call, b, next) * 1e-20F;
  });
}

/// Single-token steps of a shape see the inputs of the first of them.
Network stale_graph() {
  struct First {
    std::vector<std::int64_t> ids;
  };
  const auto seen = std::make_shared<std::map<std::pair<std::int64_t, std::int64_t>, First>>();
  return [seen, healthy = stand_in::toy_network(manifest())](const Call& call) {
    if (call.width() != 1) {
      healthy(call);
      return;
    }
    First& first = (*seen)[{call.rows(), call.span()}];
    if (first.ids.empty()) first.ids.assign(call.ints("input_ids"), call.ints("input_ids") + call.rows());
    Call stale = call;
    stale.memory["input_ids"] = first.ids.data();
    healthy(stale);
  };
}

/// The writes into one slot are lost.
Network lost_write(std::int64_t slot) {
  return [slot, healthy = stand_in::toy_network(manifest())](const Call& call) {
    std::vector<float> before;
    before.reserve(static_cast<std::size_t>(call.rows()));
    for (std::int64_t b = 0; b < call.rows(); ++b) before.push_back(slot_of(call, b, slot));
    healthy(call);
    for (std::int64_t b = 0; b < call.rows(); ++b)
      slot_of(call, b, slot) = before[static_cast<std::size_t>(b)];
  };
}

struct Fault {
  const char* name;
  std::function<Network()> network;
  const char* found_in;  // the case
};

std::vector<Fault> faults() {
  const auto scaled = [](float by) {
    return [by](const Call& call) {
      each_row(call, [by](std::int64_t, float* logits) {
        for (int v = 0; v < manifest().info.vocab_size; ++v) logits[v] *= by;
      });
    };
  };
  return {
      {"wrong scale", after(scaled(1.00001F)), "decode"},
      {"reads past the length", after(read_past_the_end), "poisoned"},
      {"stale graph", stale_graph, "decode"},
      {"lost write of a slot", [] { return lost_write(21); }, "poisoned"},
      {"lost write past a span's edge", [] { return lost_write(64); }, "span edges"},
      {"wrong span", after([](const Call& call) {
         if (call.span() == 128) logits_of(call, 0)[70] += 1;
       }),
       "span edges"},
      {"wrong row", after([](const Call& call) {
         if (call.rows() > 1) {
           std::swap_ranges(logits_of(call, 0), logits_of(call, 1), logits_of(call, 1));
         }
       }),
       "ragged rows"},
      {"wrong rows of the cache",
       with(
           [](const Call& call) {
             if (call.rows() > 2) std::swap(slot_of(call, 1, 2), slot_of(call, 2, 0));
           },
           nullptr),
       "ragged rows"},
      {"not finite", after([](const Call& call) {
         if (last_position(call, 0) == 1) {
           logits_of(call, 0)[96] = std::numeric_limits<float>::quiet_NaN();
         }
       }),
       "decode"},
      {"logits of another token", after([](const Call& call) {
         if (call.width() > 1) std::rotate(logits_of(call, 0), logits_of(call, 0) + 1, logits_of(call, 1));
       }),
       "decode"},
      {"a logit that is not among the highest", after([](const Call& call) {
         float* const row = logits_of(call, 0);
         *std::min_element(row, row + manifest().info.vocab_size) += 0.01F;
       }),
       "decode"},
  };
}

template <typename Work>
std::string refused(ErrorCode code, const Work& work) {
  try {
    work();
  } catch (const qwenport::Error& error) {
    CHECK(error.code() == code);
    CHECK(std::string(error.what()).find('\n') == std::string::npos);
    return error.what();
  }
  FAIL("nothing was refused");
  return "";
}

}  // namespace

TEST_CASE("a healthy network passes") {
  const SelfTestReport report = tested([] { return stand_in::toy_network(manifest()); });
  CHECK(report.passed);
  CHECK(report.cases == cases);
  CHECK(report.skipped == 1);
  CHECK(report.steps == steps);
  CHECK(report.marks == marks);
  CHECK(report.summary.rfind("self-test passed: 5 cases (1 left out), 30 rows of logits in ", 0) == 0);
}

TEST_CASE("a healthy network passes in every form of attention, with one profile or two") {
  for (const char* form : {"masked", "direct", "chunked", "split"}) {
    for (const bool two_profiles : {false, true}) {
      CAPTURE(form);
      const auto model = stand_in::toy_model(160, 4, 24, form, two_profiles);
      const Proof proof(bytes_of(proof_file(), model->manifest()), "proof", 97);
      const SelfTestReport report = qwenport::detail::run_proof(model, proof, "engine");
      CHECK_MESSAGE(report.passed, report.summary);
      CHECK(report.marks == marks);
    }
  }
}

TEST_CASE("every fault is caught, in the case that shows it") {
  for (const Fault& fault : faults()) {
    CAPTURE(fault.name);
    const SelfTestReport report = tested(fault.network);
    CHECK_FALSE(report.passed);
    CHECK(report.failure.case_name == fault.found_in);
    CHECK(report.failure.error > report.failure.bound);
    CHECK(report.summary.rfind(std::string("self-test failed in case \"") + fault.found_in + "\"", 0) == 0);
  }
}

TEST_CASE("only a poisoned cache shows a read past its end") {
  ProofFile file;
  file.sequences = {text(20, 3)};
  file.begin("not poisoned", 1, 20);
  for (const int end : {5, 6, 7}) file.feed({{0, 0, end}});
  CHECK(tested(after(read_past_the_end), file).passed);
  file.poison();
  file.feed({{0, 0, 8}});
  CHECK_FALSE(tested(after(read_past_the_end), file).passed);
}

TEST_CASE("a failure says where it is") {
  const auto third_row = after([](const Call& call) {
    if (call.rows() == 3 && call.width() == 1) logits_of(call, 2)[0] += 1;
  });
  const SelfTestReport report = tested(third_row);
  REQUIRE_FALSE(report.passed);
  CHECK(report.cases == 3);
  CHECK(report.failure.case_name == "ragged rows");
  CHECK(report.failure.row == 2);
  CHECK(report.failure.position == 1);
  CHECK(report.failure.span == 64);
  CHECK(report.failure.bound == doctest::Approx(1e-6));
  const auto at_the_edge = after([](const Call& call) {
    if (last_position(call, 0) == 64) logits_of(call, 0)[0] = std::numeric_limits<float>::infinity();
  });
  const SelfTestReport later = tested(at_the_edge);
  REQUIRE_FALSE(later.passed);
  CHECK(later.failure.position == 64);
  CHECK(later.failure.span == 128);
  CHECK(std::isinf(later.failure.error));
}

TEST_CASE("poison fills the slots that hold no token, and no other") {
  struct Expected {
    const char* dtype;
    const char* binding;
    int bytes;
    std::uint32_t bits;
    std::uint32_t sign;
  };
  for (const Expected& expected :
       {Expected{"fp32", "float", 4, 0x71800000, 0x80000000}, Expected{"fp16", "float16", 2, 0x6C00, 0x8000},
        Expected{"bf16", "bfloat16", 2, 0x7180, 0x8000}}) {
    CAPTURE(expected.dtype);
    std::string written = stand_in::toy_manifest_text(40, 2, 24);
    written.replace(written.find("\"fp32\""), 6, std::string("\"") + expected.dtype + "\"");
    const std::string cache = R"("float", "shape": ["batch", 2, 40, 4])";
    for (std::size_t at = 0; (at = written.find(cache, at)) != std::string::npos; ++at) {
      written.replace(at, 7, std::string("\"") + expected.binding + "\"");
    }
    const Manifest half = qwenport::detail::parse_manifest(written, "toy");
    int checked = 0;
    const auto model = std::make_shared<const stand_in::StandInModel>(half, [&] {
      return Network([&](const Call& call) {
        std::memset(call.memory.at("logits"), 0, static_cast<std::size_t>(call.rows()) * 97 * sizeof(float));
        if (call.width() != 1) return;
        for (const auto& cache : half.caches) {
          const auto* next = static_cast<const std::byte*>(call.memory.at(cache.past));
          for (int b = 0; b < 2; ++b) {
            for (int place = 0; place < 2 * 40 * 4; ++place, next += expected.bytes) {
              const int slot = place / 4 % 40;
              std::uint32_t bits = 0;
              std::memcpy(&bits, next, static_cast<std::size_t>(expected.bytes));
              const std::uint32_t poison = expected.bits | (slot % 2 != 0 ? expected.sign : 0);
              REQUIRE(bits == (slot < (b == 0 ? 5 : 2) ? 0 : poison));
              ++checked;
            }
          }
        }
      });
    });
    qwenport::detail::SessionCore session(model, {2, 40, true});
    const std::vector<Token> tokens{1, 2, 3, 4, 5};
    const qwenport::detail::TokenView rows[] = {{tokens.data(), 5}, {tokens.data(), 2}};
    session.prefill(rows, 2);
    session.poison();
    session.decode(tokens.data(), 2);
    CHECK(checked == 4 * 2 * 2 * 40 * 4);
  }
}

TEST_CASE("bounds are those of the engine's arithmetic, and a proof of another dtype is refused") {
  ProofFile file = proof_file();
  const auto off = after([](const Call& call) {
    each_row(call, [](std::int64_t, float* logits) {
      for (int v = 0; v < 97; ++v) logits[v] *= 1.001F;
    });
  });
  file.bounds = {1e-2F, 1e-6F, 1e-6F};
  CHECK(tested(off, file).passed);
  file.bounds = {1e-6F, 1e-2F, 1e-2F};
  CHECK_FALSE(tested(off, file).passed);
  file.dtype = "bf16";
  file.bounds = {1e-2F, 1e-6F, 1e-6F};
  CHECK(tested(off, file).passed);  // the engine computes in fp32
  std::string text = stand_in::toy_manifest_text();
  const std::string none = "\"quantization\": null";
  text.replace(text.find(none), none.size(),
               R"("quantization": {"weights": "4 bits in groups of 32, symmetric", "activations": "int8"})");
  const Manifest rounding = qwenport::detail::parse_manifest(text, "toy");
  CHECK(rounding.info.weights == "4 bits in groups of 32, symmetric");
  CHECK(rounding.info.activations == "int8");
  const auto model = std::make_shared<const stand_in::StandInModel>(rounding, off);
  const auto passes = [&] {
    return qwenport::detail::run_proof(model,
                                       Proof(bytes_of(file, rounding), "proof", rounding.info.vocab_size), "")
        .passed;
  };
  CHECK_FALSE(passes());
  file.bounds = {1e-6F, 1e-6F, 1e-2F};
  CHECK(passes());
}

TEST_CASE("a proof with nothing to compare proves nothing") {
  ProofFile file;
  file.sequences = {text(20, 3)};
  file.begin("too many rows", 5, 20);
  file.feed({{0, 0, 8}});
  const std::string message =
      refused(ErrorCode::not_proven, [&] { tested([] { return stand_in::toy_network(manifest()); }, file); });
  CHECK(message == "engine: its proof has nothing to compare in an engine of 4 rows of 160 slots");
}

TEST_CASE("an engine without a proof says so") {
  const qwenport::Engine engine(stand_in::toy_model(), "engine");
  CHECK_FALSE(engine.info().has_proof);
  refused(ErrorCode::not_proven, [&] { (void)engine.self_test(); });
  const qwenport::Engine strict(stand_in::toy_model(), "engine", /*require_self_test=*/true);
  refused(ErrorCode::not_proven, [&] { qwenport::Session{strict}; });
}

TEST_CASE("what a device refuses is no failure of the engine, but an error") {
  const Proof proof(bytes_of(proof_file(), manifest()), "proof", manifest().info.vocab_size);
  const auto broken = [] {
    return Network([](const Call&) { throw qwenport::Error(ErrorCode::device, "broken"); });
  };
  refused(ErrorCode::device, [&] { qwenport::detail::run_proof(model_of(broken), proof, "engine"); });
}

TEST_CASE("several threads may test one engine") {
  const Proof proof(bytes_of(proof_file(), manifest()), "proof", manifest().info.vocab_size);
  const auto model = model_of([] { return stand_in::toy_network(manifest()); });
  std::vector<std::thread> threads;
  threads.reserve(3);
  std::atomic<int> passed{0};
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      if (qwenport::detail::run_proof(model, proof, "engine").passed) ++passed;
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(passed == 3);
}
