// Qwenport's C++ runtime: runs an engine directory written by `qwenport build` inside your program.
//
// A complete program (link qwenport::runtime; examples/cpp/minimal is this one with its CMakeLists.txt):
//
//     #include <qwenport/qwenport.hpp>
//
//     #include <iostream>
//
//     int main(int argc, char** argv) {  // minimal ENGINE TOKEN...
//       try {
//         const auto engine = qwenport::Engine::load(argc > 1 ? argv[1] : "engine");
//         qwenport::Session session(engine);
//         std::vector<qwenport::Token> prompt;
//         for (int i = 2; i < argc; ++i) prompt.push_back(std::stoll(argv[i]));
//         qwenport::GenerateOptions options;
//         options.max_new_tokens = 40;
//         session.generate(prompt, options, [](int, auto token) { std::cout << token << ' ' << std::flush; });
//       } catch (const std::exception& error) {
//         std::cerr << "error: " << error.what() << '\n';
//         return 2;
//       }
//     }
//
// Threads. An Engine never changes after load: copy it and use it from any number of threads. A Session
// belongs to one thread at a time; two sessions, even of one engine, may run concurrently on two
// threads. Cancellation::request is the only call that any thread may make while a session works.
//
// Destroy sessions and engines before main returns: CUDA shuts down with the process, in an order that a
// global or static object cannot rely on. A call to a TensorRT engine makes its GPU current and restores the previous
// one when it ends.
#ifndef QWENPORT_QWENPORT_HPP
#define QWENPORT_QWENPORT_HPP

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <qwenport/export.h>

namespace qwenport {

/// A token id of the model's vocabulary.
using Token = std::int64_t;

/// In decode_batch: leave this row alone.
constexpr Token idle = -1;

/// Error codes. The C API has the same numbers.
enum class ErrorCode : int {
  invalid_argument = 1,  ///< a value outside its range: a token id, a sampling parameter, too many rows
  bad_engine = 2,        ///< the directory is not an engine, is damaged, or was changed
  missing_library = 3,   ///< onnxruntime, TensorRT, the CUDA driver or the plugin library cannot be loaded
  wrong_gpu = 4,         ///< no GPU, or one that the engine was not built for
  wrong_version = 5,     ///< the engine was built for another flavour, or another release of its runtime
  capacity = 6,          ///< a row would pass the cache's capacity; nothing was written
  sampling = 7,          ///< no token can be chosen from the logits (NaN, +inf, all -inf)
  bad_snapshot = 8,      ///< restore: not a snapshot, damaged, or from another engine
  device = 9,            ///< the runtime or CUDA failed; the session is unusable, the message says why
  internal = 10,         ///< a bug in Qwenport: please report it
  not_proven = 11,       ///< the engine carries no proof, or a self-test is required and has not passed here
};

/// The exception that this library throws. Its message is one line and says what to do. Apart from it, only
/// std::bad_alloc and a callback's own exceptions pass through.
class QWENPORT_EXPORT Error : public std::runtime_error {
 public:
  /// Whatever may break a line in the message becomes a space.
  Error(ErrorCode code, const std::string& message);
  [[nodiscard]] ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

/// Facts from an engine's manifest.
struct EngineInfo {
  int vocab_size = 0;
  int capacity = 0;               ///< cache slots per row
  int max_batch = 0;              ///< rows
  int max_step_tokens = 0;        ///< tokens per row and step; longer prompts run in several steps
  std::string dtype;              ///< of weights and cache: "fp32", "fp16" or "bf16"
  std::string weights;            ///< how quantized weights are stored, in words; else the dtype
  std::string activations;        ///< the dtype; "int8" or "fp8" if quantized products round them to it
  std::string flavour;            ///< "onnxruntime", "tensorrt" or "tensorrt-rtx"
  std::string runtime_version;    ///< the TensorRT that built it, or the oldest onnxruntime that runs it
  std::vector<std::string> gpus;  ///< the GPUs it was built for: "sm90", ...; none for onnxruntime
  std::size_t cache_bytes_per_row = 0;  ///< memory of a session's caches per row, at the engine's capacity
  bool has_proof = false;               ///< it carries what self_test compares with
};

/// How onnxruntime loads an engine.
enum class LoadMode : int {
  fast_steps = 0,  ///< weights are laid out for the processor: the load takes longer, and a copy of them
  fast_start = 1,  ///< weights are used where the file is mapped: ready sooner, steps are slower
};

/// How an engine is loaded. What does not apply to its flavour is ignored.
struct EngineOptions {
  int gpu = 0;      ///< TensorRT: CUDA device number
  int threads = 0;  ///< onnxruntime: CPU threads of a step, at most 1024; 0 lets onnxruntime choose
  LoadMode load = LoadMode::fast_steps;  ///< onnxruntime
  /// The onnxruntime library, a path; empty: the environment's QWENPORT_ONNXRUNTIME, else libonnxruntime.so.1 beside
  /// this library, beside the program, or where the loader finds it.
  std::string onnxruntime;
  /// Make no session until Engine::self_test has passed for this engine, GPU, driver and runtime.
  bool require_self_test = false;
};

/// The first wrong row of logits of a self-test.
struct SelfTestFailure {
  std::string case_name;
  int call = 0;      ///< as numbered in the proof
  int row = 0;       ///< of the session
  int position = 0;  ///< of the token whose logits they are, from 0
  int span = 0;      ///< cache slots that the step attended to
  double error = 0;  ///< relative to the norm of the logits; infinity if one of them is not finite
  double bound = 0;  ///< what is allowed
};

/// What a self-test found.
struct SelfTestReport {
  bool passed = false;
  int cases = 0;    ///< that ran to their end
  int skipped = 0;  ///< cases that need more rows or slots than the engine has
  int steps = 0;    ///< calls of prefill
  int marks = 0;    ///< rows of logits that were compared, with a bound that proves something (below 0.5)
  double seconds = 0;
  SelfTestFailure failure;  ///< if it has not passed
  /// A pass is written to the user's cache, where other processes find it. If that fails, it counts for this engine only.
  bool remembered = false;
  std::string summary;  ///< one line
};

namespace detail {
class Model;
class SelfTest;
class SessionCore;
}  // namespace detail

/// A loaded engine: the weights. A handle; copies share one engine.
class QWENPORT_EXPORT Engine {
 public:
  /// Load an engine directory with the runtime that it was built for.
  ///
  /// The plan or graph is checked against the manifest's SHA-256, weights beside it by their size and header; the
  /// runtime's flavour and version, and the GPU, against those that the engine was built for.
  /// \param directory an engine directory written by `qwenport build`.
  /// \throws Error bad_engine, missing_library, wrong_gpu, wrong_version, device, invalid_argument.
  static Engine load(const std::string& directory, const EngineOptions& options = {});

  [[nodiscard]] const EngineInfo& info() const noexcept;

  /// Whether this GPU (or CPU), driver and runtime reproduce what the judged package computes: runs the vectors that the
  /// engine carries through a session of its own, up to the first wrong row of logits. A pass is remembered.
  /// \throws Error not_proven (it carries none, or none that fits its sizes), bad_engine (they are damaged, or another
  ///   engine's), device.
  [[nodiscard]] SelfTestReport self_test() const;

  /// Of load, and of tests: an engine of any backend, and its directory.
  explicit Engine(std::shared_ptr<const detail::Model> model, const std::string& directory = "",
                  bool require_self_test = false);

 private:
  friend class Session;
  friend class Chat;
  std::shared_ptr<const detail::Model> model_;
  std::string directory_;
  std::shared_ptr<detail::SelfTest> self_test_;
};

struct SessionOptions {
  int max_batch = 1;  ///< rows; at most the engine's
  /// Usable cache slots per row, at most the engine's; 0 means the engine's. onnxruntime allocates these; with TensorRT
  /// the memory is the engine's capacity either way.
  int capacity = 0;
  /// Replay single-token steps as CUDA graphs. Each shape (rows, and the cache's active span) has one, captured in its first two steps: it costs a few milliseconds and an execution context's memory. No
  /// effect on TensorRT-RTX, which compiles better kernels while it runs (a graph would keep the first ones), and on
  /// onnxruntime.
  bool cuda_graphs = true;
};

/// The logits of a call: a view of host memory, valid until the session's next call.
class Logits {
 public:
  Logits(const float* data, const char* present, int rows, int vocab_size)
      : data_(data), present_(present), rows_(rows), vocab_size_(vocab_size) {}

  /// The fp32 [vocab_size] logits after the row's last token; nullptr for a row that was given no token.
  /// \throws Error invalid_argument: no such row.
  [[nodiscard]] const float* row(int row) const {
    if (row < 0 || row >= rows_) throw Error(ErrorCode::invalid_argument, "no such row of logits");
    return present_[row] != 0 ? data_ + static_cast<std::ptrdiff_t>(row) * vocab_size_ : nullptr;
  }
  [[nodiscard]] int rows() const noexcept { return rows_; }
  [[nodiscard]] int vocab_size() const noexcept { return vocab_size_; }

 private:
  const float* data_;
  const char* present_;
  int rows_;
  int vocab_size_;
};

/// Ends a generation from another thread, or from a signal handler: request does nothing but store to a lock-free atomic.
/// It stays requested until it is reset.
class Cancellation {
 public:
  void request() noexcept { requested_.store(true, std::memory_order_relaxed); }
  /// Before it serves the next generation.
  void reset() noexcept { requested_.store(false, std::memory_order_relaxed); }
  [[nodiscard]] bool requested() const noexcept { return requested_.load(std::memory_order_relaxed); }

 private:
  static_assert(std::atomic<bool>::is_always_lock_free);
  std::atomic<bool> requested_{false};
};

/// The logits of one row, to be edited: a view of fp32 [vocab_size], valid during the call that is given it.
class EditableLogits {
 public:
  EditableLogits(float* data, std::size_t size) : data_(data), size_(size) {}
  [[nodiscard]] float* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  [[nodiscard]] float* begin() const noexcept { return data_; }
  [[nodiscard]] float* end() const noexcept { return data_ + size_; }
  float& operator[](std::size_t token) const noexcept { return data_[token]; }

 private:
  float* data_;
  std::size_t size_;
};

/// Called before each token is drawn, a stop token too, and after OnToken had the row's previous token, unless that is
/// held back. It may edit the logits: the model's, before penalty, temperature, top_k and top_p; -infinity bans a token.
/// `tokens` are all that the row has drawn so far. An exception from it ends the generation. A call that uses the session,
/// any but lengths, max_batch, capacity and cuda_graphs, changes nothing: it throws Error invalid_argument, which then also
/// ends the generation.
using OnLogits = std::function<void(int row, EditableLogits logits, const std::vector<Token>& tokens)>;

/// How tokens are chosen and when to stop. The values mean the same as in transformers' generate; the same
/// logits and seed give the same token as `qwenport generate`, bit for bit.
struct GenerateOptions {
  int max_new_tokens = 256;        ///< at least 1; a row draws no more tokens than this
  std::vector<Token> stop_tokens;  ///< end of sequence, end of turn; may be empty
  /// None empty. A row ends when its new tokens end with one, as it does with a stop token: the sequence is not part of
  /// the result. Tokens that may be the beginning of a sequence are held back until that is decided. A stop token comes
  /// first; of several sequences that end together the longest counts.
  std::vector<std::vector<Token>> stop_sequences;
  double temperature = 0;         ///< 0, which is greedy, or in [1e-30, 1e30]
  std::int64_t top_k = 0;         ///< keep the k highest and ties with the k-th; 0 keeps all
  double top_p = 1;               ///< nucleus, in [0, 1]; 1 keeps all
  double repetition_penalty = 1;  ///< over this prompt and the new tokens, in [1e-30, 1e30]; 1 is off
  std::uint64_t seed = 0;         ///< row b draws from the stream (seed, b)
  /// Continue after the tokens that the rows hold, instead of resetting the session. To continue a
  /// generation, start the prompt with its Generated::pending.
  bool append = false;
  const Cancellation* cancellation = nullptr;  ///< checked before every step
  OnLogits on_logits;                          ///< edits logits before a token is drawn; may be empty
  /// How many of the most likely tokens get log-probabilities besides each new token itself, at most vocab_size; -1:
  /// there are none. They are log_softmax of the logits after on_logits, before penalty, temperature, top_k and top_p.
  int logprobs = -1;
};

enum class FinishReason : int {
  stop = 0,       ///< a stop token or a stop sequence was drawn
  length = 1,     ///< max_new_tokens; also if the cache is full at the same time
  capacity = 2,   ///< the row's cache is full
  cancelled = 3,  ///< Cancellation::request
};

/// A token and its log-probability, which is -infinity if it cannot be drawn.
struct TokenLogprob {
  Token token = 0;
  float logprob = 0;
};

/// What one row generated.
struct Generated {
  std::vector<Token> tokens;  ///< without the stop token or stop sequence
  FinishReason reason = FinishReason::length;
  Token stop_token = -1;   ///< the stop token that was drawn, or -1
  int stop_sequence = -1;  ///< the index of the stop sequence that was drawn, or -1
  /// The tokens among prompt, new tokens and stop token or stop sequence that the cache does not hold: the last one
  /// drawn, and after an early cancellation the rest of the prompt. Of a stop sequence the cache thus holds all tokens
  /// but the last.
  std::vector<Token> pending;
  std::vector<float> logprobs;  ///< of `tokens`; empty if GenerateOptions::logprobs is -1
  /// For each of `tokens` the most likely ones, highest first, equal ones by ascending id; empty if
  /// GenerateOptions::logprobs is below 1.
  std::vector<std::vector<TokenLogprob>> top_logprobs;
};

/// Called for each new token (not for those that end a row) right after it is drawn, or once it is certain that it begins
/// no stop sequence. An exception from it ends the generation, and so does a call that uses the session: see OnLogits.
using OnToken = std::function<void(int row, Token token)>;

/// An engine with a KV cache of max_batch rows, fed token by token. For one thread at a time.
///
/// Caches, workspace and step buffers are allocated on construction; only capturing a CUDA graph takes
/// memory later. After an Error with code device a session can only be destroyed; after any other it is as
/// before the call, except that generate keeps what it has run so far. One that a callback destroys or moves lives until its
/// generation has ended.
class QWENPORT_EXPORT Session {
 public:
  /// \throws Error invalid_argument (more rows or slots than the engine has), device (out of memory), not_proven
  ///   (EngineOptions::require_self_test).
  explicit Session(const Engine& engine, const SessionOptions& options = {});
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session();

  /// Append tokens to row 0; call again to continue. Returns the logits after the last one.
  ///
  /// A prompt that is given in several calls states its length in each, if the model scales by length (Qwen2.5-1M beyond
  /// 262,144 positions): other models do not depend on it.
  /// \param prompt_length the tokens that the row will hold when its whole prompt is there; 0: after this call.
  /// \throws Error invalid_argument (also: a prompt whose length scales otherwise than the tokens that the row holds),
  ///   capacity: nothing was written.
  Logits prefill(const std::vector<Token>& tokens, int prompt_length = 0);
  /// Append rows[b] to row b. Rows may differ in length and may be empty. A step is no wider than the free
  /// space in the fullest row, even if idle: truncate a row that has ended before others get long prompts.
  /// \param prompt_lengths one for each row, as above but not 0; empty: the rows' lengths after this call.
  Logits prefill_batch(const std::vector<std::vector<Token>>& rows,
                       const std::vector<int>& prompt_lengths = {});
  /// Append one token to row 0.
  Logits decode(Token token);
  /// Append one token per row; `idle` leaves a row alone.
  Logits decode_batch(const std::vector<Token>& tokens);

  /// Reset (unless options.append), prefill the prompt and decode until it ends.
  /// \throws Error invalid_argument, capacity (no room for the prompt): nothing has run;
  ///   sampling.
  Generated generate(const std::vector<Token>& prompt, const GenerateOptions& options = {},
                     const OnToken& on_token = nullptr);
  /// The same for several prompts at once, one per row; a row that ends idles while the others continue. A
  /// row's result does not depend on the others.
  std::vector<Generated> generate_batch(const std::vector<std::vector<Token>>& prompts,
                                        const GenerateOptions& options = {},
                                        const OnToken& on_token = nullptr);

  /// Forget all tokens.
  void reset();
  /// Keep the first `length` tokens of a row. \throws Error invalid_argument: it holds fewer.
  void truncate(int length, int row = 0);
  /// The tokens that each of the max_batch rows holds.
  [[nodiscard]] std::vector<int> lengths() const;
  [[nodiscard]] int max_batch() const noexcept;
  [[nodiscard]] int capacity() const noexcept;
  /// Whether single-token steps are replayed as CUDA graphs; also false once the device has refused one.
  [[nodiscard]] bool cuda_graphs() const noexcept;

  /// The cache's content (only the used slots), which can be restored into a session of the same engine with
  /// the same number of rows, in this process or another.
  [[nodiscard]] std::vector<std::byte> save() const;
  /// \throws Error bad_snapshot, capacity: the session is unchanged.
  void restore(const std::vector<std::byte>& snapshot);

 private:
  friend class Chat;
  std::shared_ptr<detail::SessionCore> core_;
};

}  // namespace qwenport

#endif
