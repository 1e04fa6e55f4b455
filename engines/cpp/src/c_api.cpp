// The C API on top of the C++ API. No exception leaves a function; its message is stored per thread.
#include "qwenport/qwenport.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "c_guard.hpp"
#include "c_types.hpp"
#include "qwenport/qwenport.hpp"

struct qwenport_session {
  qwenport::Session session;
};

namespace {

using qwenport::ErrorCode;
using qwenport::Token;
using qwenport::detail::guarded;
using qwenport::detail::need;
using qwenport::detail::options_of;
using qwenport::detail::rows_of;

static_assert(static_cast<int>(ErrorCode::invalid_argument) == QWENPORT_INVALID_ARGUMENT);
static_assert(static_cast<int>(ErrorCode::bad_engine) == QWENPORT_BAD_ENGINE);
static_assert(static_cast<int>(ErrorCode::missing_library) == QWENPORT_MISSING_LIBRARY);
static_assert(static_cast<int>(ErrorCode::wrong_gpu) == QWENPORT_WRONG_GPU);
static_assert(static_cast<int>(ErrorCode::wrong_version) == QWENPORT_WRONG_VERSION);
static_assert(static_cast<int>(ErrorCode::capacity) == QWENPORT_CAPACITY);
static_assert(static_cast<int>(ErrorCode::sampling) == QWENPORT_SAMPLING);
static_assert(static_cast<int>(ErrorCode::bad_snapshot) == QWENPORT_BAD_SNAPSHOT);
static_assert(static_cast<int>(ErrorCode::device) == QWENPORT_DEVICE);
static_assert(static_cast<int>(ErrorCode::internal) == QWENPORT_INTERNAL);
static_assert(static_cast<int>(ErrorCode::not_proven) == QWENPORT_NOT_PROVEN);
static_assert(static_cast<int>(qwenport::FinishReason::stop) == QWENPORT_FINISH_STOP);
static_assert(static_cast<int>(qwenport::FinishReason::length) == QWENPORT_FINISH_LENGTH);
static_assert(static_cast<int>(qwenport::FinishReason::capacity) == QWENPORT_FINISH_CAPACITY);
static_assert(static_cast<int>(qwenport::FinishReason::cancelled) == QWENPORT_FINISH_CANCELLED);
static_assert(static_cast<int>(qwenport::LoadMode::fast_steps) == QWENPORT_LOAD_FAST_STEPS);
static_assert(static_cast<int>(qwenport::LoadMode::fast_start) == QWENPORT_LOAD_FAST_START);
static_assert(qwenport::idle == QWENPORT_IDLE);

/// A value of the session, or -1 and a message.
template <typename Get>
int value_of(const qwenport_session* session, const Get& get) noexcept {
  int value = -1;
  guarded([&] {
    need({{"session", session}});
    value = get(session->session);
  });
  return value;
}

void put_rows(const qwenport::Logits& from, const float** logits) {
  for (int b = 0; b < from.rows(); ++b) logits[b] = from.row(b);
}

void check_buffers(int wanted, const qwenport_logprobs* given) {
  const auto invalid = [](const char* message) {
    throw qwenport::Error(ErrorCode::invalid_argument, message);
  };
  if (wanted < 0 && given != nullptr)
    invalid("there is a place for log-probabilities, but options.logprobs is -1");
  if (wanted < 0) return;
  if (given == nullptr || given->logprobs == nullptr ||
      (wanted > 0 && (given->top_tokens == nullptr || given->top_logprobs == nullptr))) {
    invalid(
        "options.logprobs asks for log-probabilities, but there is no place for them: see qwenport_logprobs");
  }
}

/// Write a row's log-probabilities, whose first column is `column`.
void put_logprobs(const qwenport::Generated& row, std::size_t column, const qwenport_logprobs& to) {
  std::copy(row.logprobs.begin(), row.logprobs.end(), to.logprobs + column);
  for (std::size_t i = 0; i < row.top_logprobs.size(); ++i) {
    const auto& likely = row.top_logprobs[i];
    for (std::size_t j = 0; j < likely.size(); ++j) {
      const std::size_t at = (column + i) * likely.size() + j;
      to.top_tokens[at] = likely[j].token;
      to.top_logprobs[at] = likely[j].logprob;
    }
  }
}

/// This thread's last error message. Cut to a fixed size, so that storing it cannot fail.
thread_local char last_error[1024] = "";

}  // namespace

int qwenport::detail::keep_error(ErrorCode code, const char* text) noexcept {
  std::strncpy(last_error, text, sizeof last_error - 1);
  return static_cast<int>(code);
}

extern "C" {

const char* qwenport_last_error(void) { return last_error; }

qwenport_engine_options qwenport_engine_defaults(void) {
  const qwenport::EngineOptions options;
  return {options.gpu, options.threads, static_cast<int>(options.load), nullptr,
          options.require_self_test ? 1 : 0};
}

int qwenport_engine_load(const char* directory, const qwenport_engine_options* options,
                         qwenport_engine** engine) {
  return guarded([&] {
    need({{"directory", directory}, {"engine", engine}});
    const qwenport_engine_options given = options != nullptr ? *options : qwenport_engine_defaults();
    qwenport::Engine loaded = qwenport::Engine::load(
        directory, {given.gpu, given.threads, static_cast<qwenport::LoadMode>(given.load),
                    given.onnxruntime != nullptr ? given.onnxruntime : "", given.require_self_test != 0});
    std::string gpus;
    for (const std::string& name : loaded.info().gpus) gpus += (gpus.empty() ? "" : ",") + name;
    *engine = new qwenport_engine{std::move(loaded), std::move(gpus)};
  });
}

void qwenport_engine_free(qwenport_engine* engine) { delete engine; }

qwenport_engine_info qwenport_engine_get_info(const qwenport_engine* engine) {
  qwenport_engine_info found{};
  guarded([&] {
    need({{"engine", engine}});
    const qwenport::EngineInfo& info = engine->engine.info();
    found = {info.vocab_size,
             info.capacity,
             info.max_batch,
             info.max_step_tokens,
             info.dtype.c_str(),
             info.flavour.c_str(),
             info.runtime_version.c_str(),
             engine->gpus.c_str(),
             info.cache_bytes_per_row,
             info.has_proof ? 1 : 0,
             info.weights.c_str(),
             info.activations.c_str()};
  });
  return found;
}

int qwenport_engine_self_test(const qwenport_engine* engine, qwenport_self_test_report* report) {
  return guarded([&] {
    need({{"engine", engine}, {"report", report}});
    const qwenport::SelfTestReport found = engine->engine.self_test();
    const qwenport::SelfTestFailure& failure = found.failure;
    *report = {found.passed ? 1 : 0, found.cases,  found.skipped,
               found.steps,          found.marks,  found.remembered ? 1 : 0,
               found.seconds,        failure.call, failure.row,
               failure.position,     failure.span, failure.error,
               failure.bound,        {},           {}};
    std::strncpy(report->case_name, failure.case_name.c_str(), sizeof report->case_name - 1);
    std::strncpy(report->summary, found.summary.c_str(), sizeof report->summary - 1);
  });
}

qwenport_session_options qwenport_session_defaults(void) {
  const qwenport::SessionOptions options;
  return {options.max_batch, options.capacity, options.cuda_graphs ? 1 : 0};
}

int qwenport_session_create(const qwenport_engine* engine, const qwenport_session_options* options,
                            qwenport_session** session) {
  return guarded([&] {
    need({{"engine", engine}, {"session", session}});
    const qwenport_session_options given = options != nullptr ? *options : qwenport_session_defaults();
    *session = new qwenport_session{
        qwenport::Session(engine->engine, {given.max_batch, given.capacity, given.cuda_graphs != 0})};
  });
}

void qwenport_session_free(qwenport_session* session) { delete session; }

int qwenport_session_prefill(qwenport_session* session, const int64_t* const* rows, const size_t* sizes,
                             const int* prompt_lengths, size_t count, const float** logits) {
  return guarded([&] {
    need({{"session", session}, {"rows", rows}, {"sizes", sizes}, {"logits", logits}});
    const std::vector<int> lengths(prompt_lengths, prompt_lengths + (prompt_lengths != nullptr ? count : 0));
    put_rows(session->session.prefill_batch(rows_of(rows, sizes, count, "rows"), lengths), logits);
  });
}

int qwenport_session_decode(qwenport_session* session, const int64_t* tokens, size_t count,
                            const float** logits) {
  return guarded([&] {
    need({{"session", session}, {"tokens", tokens}, {"logits", logits}});
    put_rows(session->session.decode_batch({tokens, tokens + count}), logits);
  });
}

qwenport_generate_options qwenport_generate_defaults(void) {
  const qwenport::GenerateOptions options;
  return {options.max_new_tokens,
          nullptr,
          0,
          nullptr,
          nullptr,
          0,
          options.temperature,
          options.top_k,
          options.top_p,
          options.repetition_penalty,
          options.seed,
          options.append ? 1 : 0,
          nullptr,
          nullptr,
          options.logprobs};
}

int qwenport_generate(qwenport_session* session, const int64_t* const* prompts, const size_t* sizes,
                      size_t count, const qwenport_generate_options* options, qwenport_on_token on_token,
                      void* user, int64_t* tokens, qwenport_generated* results,
                      const qwenport_logprobs* logprobs) {
  return guarded([&] {
    need({{"session", session},
          {"prompts", prompts},
          {"sizes", sizes},
          {"tokens", tokens},
          {"results", results}});
    const qwenport_generate_options given = options != nullptr ? *options : qwenport_generate_defaults();
    check_buffers(given.logprobs, logprobs);
    qwenport::OnToken forward;
    if (on_token != nullptr) forward = [=](int row, Token token) { on_token(user, row, token); };
    const auto rows = session->session.generate_batch(rows_of(prompts, sizes, count, "prompts"),
                                                      options_of(given, &user), forward);
    for (size_t b = 0; b < count; ++b) {
      const qwenport::Generated& row = rows[b];
      const size_t column = b * static_cast<size_t>(given.max_new_tokens);
      std::copy(row.tokens.begin(), row.tokens.end(), tokens + column);
      if (logprobs != nullptr) put_logprobs(row, column, *logprobs);
      results[b] = {row.tokens.size(), static_cast<int>(row.reason), row.stop_token, row.stop_sequence,
                    row.pending.size()};
    }
  });
}

void qwenport_session_reset(qwenport_session* session) {
  guarded([&] {
    need({{"session", session}});
    session->session.reset();
  });
}

int qwenport_session_truncate(qwenport_session* session, int length, int row) {
  return guarded([&] {
    need({{"session", session}});
    session->session.truncate(length, row);
  });
}

int qwenport_session_lengths(const qwenport_session* session, int* lengths) {
  return guarded([&] {
    need({{"session", session}, {"lengths", lengths}});
    const std::vector<int> held = session->session.lengths();
    std::copy(held.begin(), held.end(), lengths);
  });
}

int qwenport_session_max_batch(const qwenport_session* session) {
  return value_of(session, [](const qwenport::Session& given) { return given.max_batch(); });
}

int qwenport_session_capacity(const qwenport_session* session) {
  return value_of(session, [](const qwenport::Session& given) { return given.capacity(); });
}

int qwenport_session_cuda_graphs(const qwenport_session* session) {
  return value_of(session, [](const qwenport::Session& given) { return given.cuda_graphs() ? 1 : 0; });
}

int qwenport_session_save(const qwenport_session* session, void** snapshot, size_t* bytes) {
  return guarded([&] {
    need({{"session", session}, {"snapshot", snapshot}, {"bytes", bytes}});
    const std::vector<std::byte> saved = session->session.save();
    void* copy = std::malloc(saved.size());
    if (copy == nullptr) throw std::bad_alloc();
    std::memcpy(copy, saved.data(), saved.size());
    *snapshot = copy;
    *bytes = saved.size();
  });
}

int qwenport_session_restore(qwenport_session* session, const void* snapshot, size_t bytes) {
  return guarded([&] {
    need({{"session", session}, {"snapshot", snapshot}});
    const auto* data = static_cast<const std::byte*>(snapshot);
    session->session.restore({data, data + bytes});
  });
}

void qwenport_snapshot_free(void* snapshot) { std::free(snapshot); }

qwenport_cancellation* qwenport_cancellation_create(void) { return new (std::nothrow) qwenport_cancellation; }

void qwenport_cancellation_request(qwenport_cancellation* cancellation) {
  if (cancellation != nullptr) cancellation->cancellation.request();
}

void qwenport_cancellation_reset(qwenport_cancellation* cancellation) {
  if (cancellation != nullptr) cancellation->cancellation.reset();
}

void qwenport_cancellation_free(qwenport_cancellation* cancellation) { delete cancellation; }

}  // extern "C"
