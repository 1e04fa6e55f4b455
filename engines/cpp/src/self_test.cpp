#include "self_test.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#include "contract.hpp"
#include "passes.hpp"
#include "session.hpp"

namespace qwenport::detail {
namespace {

/// Of a bound: so large an error is compared with it, and counts as nothing compared.
constexpr double no_proof = 0.5;

/// What POISON writes, as bits: 2^100, or for fp16 2^12.
std::uint32_t poison_bits(const Manifest& manifest) {
  if (manifest.element_bytes == 4) return 0x71800000;
  return manifest.info.dtype == "fp16" ? 0x6C00 : 0x7180;
}

/// What makes a pass count: the engine, the device and the software on it.
PassKey key_of(const Model& model) {
  const Machine machine = model.machine();
  return {std::string(contract::self_test_format) + " " + std::to_string(contract::self_test_version),
          model.manifest().sha256, machine.device, machine.driver,
          model.manifest().info.flavour + " " + machine.runtime_version};
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g", value);
  return text;
}

std::string in_words(const SelfTestReport& report) {
  const SelfTestFailure& failure = report.failure;
  if (!report.passed) {
    return "self-test failed in case \"" + failure.case_name + "\", call " + std::to_string(failure.call) +
           ": row " + std::to_string(failure.row) + ", position " + std::to_string(failure.position) +
           ", span " + std::to_string(failure.span) + ": error " + number(failure.error) + ", allowed is " +
           number(failure.bound);
  }
  return "self-test passed: " + std::to_string(report.cases) + " cases (" + std::to_string(report.skipped) +
         " left out), " + std::to_string(report.marks) + " rows of logits in " + number(report.seconds) +
         " s";
}

/// For each step of a case, the lengths of the rows' whole prompts, of which it feeds a piece; none if it is a decode, which
/// gives no row more than one token. A row's prompt goes on until a decode, or until it is cut: as in
/// engines/self_test.py.
std::vector<std::vector<int>> prompt_lengths(const ProofCase& one) {
  const auto rows = static_cast<std::size_t>(one.rows);
  std::vector<std::vector<int>> lengths(one.steps.size());
  std::vector<int> held(rows);
  std::vector<std::vector<std::size_t>> pieces(rows);  // the steps of each row's prompt so far
  for (std::size_t i = 0; i < one.steps.size(); ++i) {
    const ProofStep& step = one.steps[i];
    if (step.kind == ProofStep::Kind::feed) {
      const bool decodes = std::all_of(step.feeds.begin(), step.feeds.end(),
                                       [](const ProofFeed& each) { return each.count == 1; });
      if (!decodes) lengths[i] = held;
      for (const ProofFeed& each : step.feeds) {
        const auto row = static_cast<std::size_t>(each.row);
        held[row] = each.end;
        if (decodes) {
          pieces[row].clear();
          continue;
        }
        pieces[row].push_back(i);
        for (const std::size_t piece : pieces[row]) lengths[piece][row] = each.end;
      }
    } else if (step.kind == ProofStep::Kind::truncate) {
      held[static_cast<std::size_t>(step.row)] = step.length;
      pieces[static_cast<std::size_t>(step.row)].clear();
    } else if (step.kind == ProofStep::Kind::reset) {
      held.assign(rows, 0);
      pieces.assign(rows, {});
    }
  }
  return lengths;
}

/// Runs steps of a proof through one session.
class Runner {
 public:
  Runner(const std::shared_ptr<const Model>& model, const Proof& proof, const SessionOptions& options,
         std::size_t bound)
      : proof_(proof), session_(model, options), bound_(bound) {}

  /// False once logits are wrong; the report then says which.
  bool run(const ProofCase& one, SelfTestReport& report) {
    session_.reset();
    const std::vector<std::vector<int>> lengths = prompt_lengths(one);
    for (std::size_t i = 0; i < one.steps.size(); ++i) {
      const ProofStep& step = one.steps[i];
      switch (step.kind) {
        case ProofStep::Kind::feed:
          if (!feed(one, step, lengths[i], report)) return false;
          break;
        case ProofStep::Kind::truncate:
          session_.truncate(step.length, step.row);
          break;
        case ProofStep::Kind::poison:
          session_.poison();
          break;
        case ProofStep::Kind::reset:
          session_.reset();
          break;
      }
    }
    ++report.cases;
    return true;
  }

 private:
  bool feed(const ProofCase& one, const ProofStep& step, const std::vector<int>& lengths,
            SelfTestReport& report) {
    const auto rows = static_cast<std::size_t>(step.feeds.back().row) + 1;
    tokens_.resize(std::max(tokens_.size(), rows));
    std::vector<TokenView> views(rows);
    for (const ProofFeed& each : step.feeds) {
      const auto row = static_cast<std::size_t>(each.row);
      tokens_[row].assign(each.tokens, each.tokens + each.count);
      views[row] = {tokens_[row].data(), each.count};
    }
    decoded_.assign(rows, idle);
    for (const ProofFeed& each : step.feeds) decoded_[static_cast<std::size_t>(each.row)] = *each.tokens;
    const Logits logits = lengths.empty() ? session_.decode(decoded_.data(), rows)
                                          : session_.prefill(views.data(), rows, lengths.data());
    ++report.steps;
    for (const ProofFeed& each : step.feeds) {
      if (each.mark == nullptr) continue;
      const double error = proof_.error(*each.mark, logits.row(each.row));
      const double bound = each.mark->bounds[bound_];
      if (bound < no_proof) ++report.marks;
      if (error <= bound) continue;
      report.failure = {one.name, step.call, each.row, each.end - 1, session_.span(), error, bound};
      return false;
    }
    return true;
  }

  const Proof& proof_;
  SessionCore session_;
  std::size_t bound_;
  std::vector<std::vector<Token>> tokens_;  // of a call's rows
  std::vector<Token> decoded_;              // the first of each
};

}  // namespace

void SessionCore::poison() {
  check_usable();
  const auto slots = static_cast<std::size_t>(slots_);
  const std::size_t slot_bytes = manifest().slot_bytes();
  const auto element_bytes = static_cast<std::size_t>(manifest().element_bytes);
  const std::uint32_t sign = std::uint32_t{1} << (8 * element_bytes - 1);
  const Memory filled = pinned_memory(slots * slot_bytes);
  auto* const values = static_cast<std::byte*>(filled.get());
  for (std::size_t slot = 0; slot < slots; ++slot) {
    const std::uint32_t bits = poison_bits(manifest()) | (slot % 2 != 0 ? sign : 0);
    for (std::size_t at = 0; at < slot_bytes; at += element_bytes) {
      std::memcpy(values + slot * slot_bytes + at, &bits, element_bytes);  // little endian
    }
  }
  failed_ = true;  // until all of it is written
  for (const Memory& cache : caches_) {
    auto* head = static_cast<std::byte*>(cache.get());
    for (const std::vector<Token>& row : held_) {
      const std::size_t used = row.size() * slot_bytes;
      for (int h = 0; h < manifest().kv_heads; ++h, head += slots * slot_bytes) {
        if (row.size() < slots)
          device_->copy_to_device(head + used, values + used, slots * slot_bytes - used);
      }
    }
  }
  device_->synchronize();
  failed_ = false;
}

SelfTestReport run_proof(const std::shared_ptr<const Model>& model, const Proof& proof,
                         const std::string& where) {
  const auto started = std::chrono::steady_clock::now();
  const Manifest& manifest = model->manifest();
  const bool is_fp32 = manifest.info.dtype == "fp32";
  if (!is_fp32 && manifest.info.dtype != proof.dtype()) {
    throw Error(ErrorCode::bad_engine, where + ": computes in " + manifest.info.dtype +
                                           ", but its proof is of a package in " + proof.dtype() +
                                           "; build the engine again");
  }
  SelfTestReport report;
  SessionOptions options;
  std::vector<const ProofCase*> fitting;
  for (const ProofCase& one : proof.cases()) {
    if (one.rows > manifest.info.max_batch || one.slots > manifest.info.capacity) {
      ++report.skipped;
      continue;
    }
    options.max_batch = std::max(options.max_batch, one.rows);
    options.capacity = std::max(options.capacity, one.slots);
    fitting.push_back(&one);
  }
  if (!fitting.empty()) {
    const std::size_t in_fp32 = manifest.info.activations == manifest.info.dtype ? 0 : 2;
    const std::size_t bound = is_fp32 ? in_fp32 : 1;
    Runner runner(model, proof, options, bound);
    report.passed = std::all_of(fitting.begin(), fitting.end(),
                                [&](const ProofCase* one) { return runner.run(*one, report); });
  }
  if (fitting.empty() || (report.passed && report.marks == 0)) {
    throw Error(ErrorCode::not_proven, where + ": its proof has nothing to compare in an engine of " +
                                           std::to_string(manifest.info.max_batch) + " rows of " +
                                           std::to_string(manifest.info.capacity) + " slots");
  }
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  report.summary = in_words(report);
  return report;
}

SelfTest::SelfTest(std::shared_ptr<const Model> model, std::string directory, bool required)
    : model_(std::move(model)), directory_(std::move(directory)), required_(required) {
  if (model_->manifest().proof) file_.emplace(path());
}

std::string SelfTest::path() const { return directory_ + "/" + contract::proof_name; }

SelfTestReport SelfTest::run() {
  const Manifest& manifest = model_->manifest();
  if (!file_ || !manifest.proof) {
    throw Error(ErrorCode::not_proven,
                directory_ + ": carries no proof; run `qwenport validate` on its package and build it again");
  }
  check_file(*manifest.proof, directory_, *file_);
  const Proof proof({static_cast<const char*>(file_->data()), file_->size()}, path(),
                    manifest.info.vocab_size);
  if (proof.package_sha256() != manifest.package_sha256) {
    throw Error(ErrorCode::bad_engine, path() + ": of another package; build the engine again");
  }
  SelfTestReport report = run_proof(model_, proof, directory_);
  const PassKey key = key_of(*model_);
  const std::scoped_lock lock(mutex_);
  passed_ = report.passed;
  if (report.passed) {
    report.remembered = remember(key, {report.cases, report.skipped, report.marks});
  } else {
    forget(key);
  }
  return report;
}

void SelfTest::check_allowed() {
  if (!required_) return;
  const std::scoped_lock lock(mutex_);
  // A pass of another process counts until this one fails.
  if (!passed_ && file_ && is_remembered(key_of(*model_))) passed_ = true;
  if (passed_.value_or(false)) return;
  const char* why =
      ": has not passed its self-test on this machine, and EngineOptions::require_self_test is set; call "
      "Engine::self_test, or run `qwenport selftest`";
  if (passed_) why = ": failed its self-test, and EngineOptions::require_self_test is set";
  if (!file_) {
    why =
        ": carries no proof, which EngineOptions::require_self_test needs; run `qwenport validate` on its "
        "package "
        "and build it again";
  }
  throw Error(ErrorCode::not_proven, directory_ + why);
}

}  // namespace qwenport::detail
