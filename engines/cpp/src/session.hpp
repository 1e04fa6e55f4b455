// The bookkeeping of a session: padding, positions, cache slots, active span, capacity, CUDA graphs.
//
// The C++ counterpart of CachedSession and TensorRTSession in engines/. Rows are right-padded: a pad token's
// key and value land in slots that no query attends to before a real token overwrites them. A row that is
// idle in a step is all padding; if it is full, it replays its last token into its own slot.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "backend.hpp"
#include "length_scale.hpp"
#include "qwenport/qwenport.hpp"

namespace qwenport::detail {

/// CUDA graphs that a session keeps; the least recently used is evicted.
constexpr std::size_t max_graphs = 8;

/// A non-owning view of tokens.
struct TokenView {
  const Token* data = nullptr;
  std::size_t size = 0;
};

/// Device memory, released with its owner.
using Memory = std::unique_ptr<void, std::function<void(void*)>>;

class SessionCore {
 public:
  using Rows = std::vector<std::vector<Token>>;

  /// While one lives, the session is its generation's: check_idle throws.
  class Generating {
   public:
    explicit Generating(SessionCore& session) : session_(session) {
      session_.generating_ = true;
      session_.misused_ = false;
    }
    ~Generating() { session_.generating_ = false; }
    Generating(const Generating&) = delete;
    Generating& operator=(const Generating&) = delete;

   private:
    SessionCore& session_;
  };

  SessionCore(std::shared_ptr<const Model> model, const SessionOptions& options);

  /// \param prompt_lengths [count], for each row the tokens that it will hold when its whole prompt is there; nullptr: after
  ///   this call.
  Logits prefill(const TokenView* rows, std::size_t count, const int* prompt_lengths = nullptr);
  /// One token per row; `idle` leaves a row alone.
  Logits decode(const Token* tokens, std::size_t count);
  void reset();
  void truncate(int length, int row);
  /// The tokens that a row holds, and how many they are.
  [[nodiscard]] const std::vector<Token>& held(std::size_t row) const noexcept { return held_[row]; }
  [[nodiscard]] int length(std::size_t row) const noexcept { return static_cast<int>(held_[row].size()); }
  [[nodiscard]] int max_batch() const noexcept { return static_cast<int>(held_.size()); }
  [[nodiscard]] int capacity() const noexcept { return capacity_; }
  [[nodiscard]] const Manifest& manifest() const noexcept { return model_->manifest(); }
  /// Tokens per row that one step takes.
  [[nodiscard]] int max_step_tokens() const noexcept { return max_step_tokens_; }
  [[nodiscard]] bool cuda_graphs() const noexcept { return cuda_graphs_; }
  /// Slots that the last step attended to.
  [[nodiscard]] int span() const noexcept { return static_cast<int>(span_); }
  /// How many of a row's tokens, from its first on, may be continued to a prompt of so many tokens.
  [[nodiscard]] std::size_t reusable(std::size_t row, std::size_t prompt_length) const;
  /// Fill every slot that holds no token with large finite numbers; see self_test.cpp.
  void poison();

  /// Before a caller's use. \throws Error invalid_argument: a generation is running, so a callback made the call.
  void check_idle();
  /// After a callback. \throws the same if a call of it was refused, even if it ignores that.
  void check_callback() const;

  [[nodiscard]] std::vector<std::byte> save();
  void restore(const std::vector<std::byte>& snapshot);

 private:
  /// An int64 input of a step: filled in pinned memory, copied to its bound address unless that is the same.
  struct Input {
    const char* name = nullptr;
    Memory pinned;
    Memory device;  // none if the device is the host
    [[nodiscard]] void* address() const noexcept { return device ? device.get() : pinned.get(); }
    [[nodiscard]] std::int64_t* values() const noexcept { return static_cast<std::int64_t*>(pinned.get()); }
  };
  /// The sizes that distinguish two steps.
  struct StepShape {
    std::int64_t rows = 0;
    std::int64_t width = 0;
    std::int64_t span = 0;
    bool operator==(const StepShape& other) const noexcept {
      return rows == other.rows && width == other.width && span == other.span;
    }
  };
  /// An executor, and the shape of its last step.
  struct Steps {
    std::unique_ptr<Executor> executor;
    StepShape shape;
  };
  /// A single-token step of one shape: its own executor, and its graph once captured.
  struct Bucket {
    StepShape shape;
    std::uint64_t last_use = 0;
    std::unique_ptr<Executor> executor;
    std::unique_ptr<Graph> graph;
  };

  Memory device_memory(std::size_t bytes);
  Memory pinned_memory(std::size_t bytes);
  Input make_input(const char* name, std::size_t count);
  std::unique_ptr<Executor> make_executor(std::size_t profile);
  [[nodiscard]] std::size_t profile_of(const StepShape& step) const;
  [[nodiscard]] bool fits(const StepShape& step) const;
  [[nodiscard]] std::int64_t span_of(std::int64_t count) const;
  void reserve_workspace();
  void grow_workspace(std::size_t bytes, const Executor* keep);
  void upload(const Input& input, std::size_t count);
  void check(const TokenView* rows, std::size_t count) const;
  void count_requests(const TokenView* rows, std::size_t count, const int* prompt_lengths);
  Logits append(const TokenView* rows, std::size_t count);
  [[nodiscard]] std::int64_t narrowed_width(std::int64_t rows, std::int64_t start, std::int64_t width) const;
  void check_usable() const;
  void set_shapes(Executor& executor, const StepShape& step) const;
  void prepare(Executor& executor, const StepShape& step);
  void run_step(std::int64_t rows, std::int64_t width, bool whole, const std::vector<char>& wanted);
  bool issue_by_graph(const StepShape& step);
  void issue(Executor& executor, const StepShape& step);
  void fetch_logits(std::int64_t rows, const std::vector<char>& wanted);
  Bucket& bucket(const StepShape& step);
  template <typename Visit>
  void for_each_used_slice(const Rows& rows, const Visit& visit);
  [[nodiscard]] std::size_t longest_slice(const Rows& rows) const;

  // Destroyed in reverse order: graphs and executors, then memory, then the device.
  std::shared_ptr<const Model> model_;
  std::unique_ptr<Device> device_;
  int capacity_;
  int slots_;  // of a cache; at least the capacity
  int max_step_tokens_;
  bool cuda_graphs_;
  bool failed_ = false;
  bool generating_ = false;
  bool misused_ = false;  // by a callback of that generation
  std::uint64_t steps_ = 0;
  std::int64_t span_ = 0;
  Rows held_;                           // the tokens whose keys and values are in the cache
  std::optional<LengthScale> scale_;    // the lengths of their requests, if the model scales by length
  std::vector<std::int64_t> requests_;  // the tokens of each row's request; scratch of prefill and decode
  std::vector<char> present_;           // for the last call's logits
  std::vector<TokenView> views_;        // scratch of decode
  std::vector<std::size_t> done_;       // scratch of prefill
  std::vector<std::int64_t> taken_;     // scratch of prefill
  std::vector<char> finishing_;         // scratch of prefill
  std::vector<Memory> caches_;          // one for each pair of cache bindings
  std::size_t workspace_bytes_ = 0;
  Memory workspace_;
  Memory queries_;  // all layers' query outputs; their values are not used
  Memory logits_;
  Memory host_logits_;  // where the rows' logits are gathered, unless they are read where they were computed
  Input key_positions_;
  Input input_ids_;
  Input position_ids_;
  Input write_indices_;
  Input logits_indices_;
  Input request_lengths_;         // only with a length scale
  std::vector<Steps> executors_;  // one for each profile
  std::vector<Bucket> buckets_;
};

}  // namespace qwenport::detail
