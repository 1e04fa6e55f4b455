#include "session.hpp"

#include <algorithm>
#include <cstring>
#include <string>

#include "contract.hpp"
#include "spans.hpp"

namespace qwenport::detail {
namespace {

constexpr std::size_t int64_bytes = sizeof(std::int64_t);

std::string text(std::int64_t number) { return std::to_string(number); }

int checked_capacity(const EngineInfo& info, const SessionOptions& options) {
  const int capacity = options.capacity == 0 ? info.capacity : options.capacity;
  if (options.max_batch < 1 || options.max_batch > info.max_batch || capacity < 1 ||
      capacity > info.capacity) {
    throw Error(ErrorCode::invalid_argument, text(options.max_batch) + " rows of " + text(capacity) +
                                                 " slots, but the engine was built for " +
                                                 text(info.max_batch) + " rows of " + text(info.capacity));
  }
  return capacity;
}

}  // namespace

Memory SessionCore::device_memory(std::size_t bytes) {
  Device* device = device_.get();
  return {device->allocate(bytes), [device](void* memory) { device->release(memory); }};
}

Memory SessionCore::pinned_memory(std::size_t bytes) {
  Device* device = device_.get();
  return {device->allocate_pinned(bytes), [device](void* memory) { device->release_pinned(memory); }};
}

SessionCore::Input SessionCore::make_input(const char* name, std::size_t count) {
  if (device_->is_host()) return {name, pinned_memory(count * int64_bytes), {}};
  return {name, pinned_memory(count * int64_bytes), device_memory(count * int64_bytes)};
}

void SessionCore::upload(const Input& input, std::size_t count) {
  if (input.device) {
    device_->copy_to_device(input.device.get(), input.pinned.get(), count * int64_bytes);
  }
}

SessionCore::SessionCore(std::shared_ptr<const Model> model, const SessionOptions& options)
    : model_(std::move(model)),
      device_(model_->make_device()),
      capacity_(checked_capacity(manifest().info, options)),
      slots_(model_->allocated_slots(capacity_)),
      max_step_tokens_(std::min(manifest().info.max_step_tokens, capacity_)),
      // TensorRT-RTX compiles better kernels while it runs; a graph would keep the first ones.
      cuda_graphs_(options.cuda_graphs && manifest().info.flavour == contract::tensorrt) {
  const auto rows = static_cast<std::size_t>(options.max_batch);
  const auto width = static_cast<std::size_t>(max_step_tokens_);
  const auto slots = static_cast<std::size_t>(capacity_);
  const std::size_t logits_bytes =
      rows * static_cast<std::size_t>(manifest().info.vocab_size) * sizeof(float);
  if (manifest().unscaled_length) {
    scale_.emplace(*manifest().unscaled_length, rows, slots);
    request_lengths_ = make_input(contract::request_lengths, rows);
  }
  held_.resize(rows);
  for (std::vector<Token>& row : held_) row.reserve(slots);
  requests_.resize(rows);
  present_.resize(rows);
  views_.resize(rows);
  done_.resize(rows);
  taken_.resize(rows);
  finishing_.resize(rows);
  for (std::size_t i = 0; i < manifest().caches.size(); ++i) {
    caches_.push_back(device_memory(rows * manifest().row_bytes(slots_)));
  }
  if (!manifest().queries.empty()) {
    queries_ =
        device_memory(rows * width * static_cast<std::size_t>(manifest().heads) * manifest().slot_bytes());
  }
  logits_ = device_memory(logits_bytes);
  host_logits_ = pinned_memory(logits_bytes);
  input_ids_ = make_input(contract::input_ids, rows * width);
  position_ids_ = make_input(contract::position_ids, rows * width);
  write_indices_ = make_input(contract::write_indices, rows);
  logits_indices_ = make_input(contract::logits_indices, rows);

  // The positions of the cache's slots never change: a step only sets how many of them it attends to.
  const std::int64_t longest = span_of(capacity_);
  key_positions_ = make_input(contract::key_positions, static_cast<std::size_t>(longest));
  for (std::int64_t i = 0; i < longest; ++i) key_positions_.values()[i] = i;
  upload(key_positions_, static_cast<std::size_t>(longest));

  for (std::size_t profile = 0; profile < manifest().profiles.size(); ++profile) {
    executors_.push_back({make_executor(profile), {}});
  }
  reserve_workspace();
  device_->synchronize();
  buckets_.reserve(max_graphs);
}

std::int64_t SessionCore::span_of(std::int64_t count) const {
  return span_holding(count, manifest().attention.span_multiple, slots_);
}

/// The most tokens per row, up to `width`, of a step from slot `start` on that there is memory for; at least 1.
std::int64_t SessionCore::narrowed_width(std::int64_t rows, std::int64_t start, std::int64_t width) const {
  while (width > 1 && !fits({rows, width, span_of(start + width)})) width = (width + 1) / 2;
  return width;
}

void SessionCore::check_idle() {
  misused_ = generating_;
  check_callback();
}

void SessionCore::check_callback() const {
  if (misused_) throw Error(ErrorCode::invalid_argument, "a callback must not use its session");
}

void SessionCore::check_usable() const {
  if (failed_) {
    throw Error(ErrorCode::device,
                "an earlier step of this session failed on the device; make a new session");
  }
}

void SessionCore::check(const TokenView* rows, std::size_t count) const {
  check_usable();
  if (count < 1 || count > held_.size()) {
    throw Error(ErrorCode::invalid_argument,
                std::to_string(count) + " rows given to a session of " + std::to_string(held_.size()));
  }
  const int vocab = manifest().info.vocab_size;
  for (std::size_t b = 0; b < count; ++b) {
    const TokenView& row = rows[b];
    const bool inside =
        std::all_of(row.data, row.data + row.size, [vocab](Token id) { return id >= 0 && id < vocab; });
    if (!inside) {
      throw Error(ErrorCode::invalid_argument,
                  "row " + std::to_string(b) + " has a token id outside the vocabulary of " + text(vocab));
    }
    // TensorRT ignores cache writes past the end, so only this check reports them.
    if (row.size > static_cast<std::size_t>(capacity_ - length(b))) {
      throw Error(ErrorCode::capacity, "row " + std::to_string(b) + " holds " + text(length(b)) +
                                           " tokens and is given " + std::to_string(row.size) +
                                           " more; there are " + text(capacity_) + " slots");
    }
  }
}

Logits SessionCore::decode(const Token* tokens, std::size_t count) {
  for (std::size_t b = 0; b < std::min(count, views_.size()); ++b) {
    views_[b] = {tokens + b, tokens[b] == idle ? std::size_t{0} : std::size_t{1}};
  }
  check(views_.data(), count);
  count_requests(views_.data(), count, nullptr);
  for (std::size_t b = 0; scale_ && b < count; ++b) {
    if (views_[b].size != 0) scale_->check_decode(b, requests_[b]);
  }
  return append(views_.data(), count);
}

Logits SessionCore::prefill(const TokenView* rows, std::size_t count, const int* prompt_lengths) {
  check(rows, count);
  count_requests(rows, count, prompt_lengths);
  for (std::size_t b = 0; scale_ && b < count; ++b) {
    if (rows[b].size != 0) scale_->check(b, requests_[b]);
  }
  return append(rows, count);
}

/// Note the tokens that each row's request has, given those appended now.
void SessionCore::count_requests(const TokenView* rows, std::size_t count, const int* prompt_lengths) {
  for (std::size_t b = 0; b < count; ++b) {
    const std::int64_t after = length(b) + static_cast<std::int64_t>(rows[b].size);
    requests_[b] = prompt_lengths == nullptr ? after : prompt_lengths[b];
    if (rows[b].size != 0 && (requests_[b] < after || requests_[b] > capacity_)) {
      throw Error(ErrorCode::invalid_argument,
                  "row " + std::to_string(b) + ": a prompt of " + std::to_string(requests_[b]) +
                      " tokens, where " + std::to_string(after) + " to " + text(capacity_) + " are possible");
    }
  }
}

/// Append rows that were checked, of the requests noted.
Logits SessionCore::append(const TokenView* rows, std::size_t count) {
  std::fill(done_.begin(), done_.end(), std::size_t{0});
  for (std::size_t b = 0; b < count; ++b) present_[b] = static_cast<char>(rows[b].size != 0);
  bool whole = false;  // every row that has tokens ends in one step, the first
  for (bool first = true;; first = false) {
    std::int64_t longest = 0;
    std::int64_t last_start = 0;
    for (std::size_t b = 0; b < count; ++b) {
      longest = std::max(longest, static_cast<std::int64_t>(rows[b].size - done_[b]));
      last_start = std::max<std::int64_t>(last_start, std::min(length(b), capacity_ - 1));
    }
    if (longest == 0) break;
    // Padding needs slots too: one step is only as wide as the fullest row has room for.
    const std::int64_t room = std::min({longest, capacity_ - last_start, std::int64_t{max_step_tokens_}});
    const std::int64_t width = narrowed_width(static_cast<std::int64_t>(count), last_start, room);
    whole = first;
    for (std::size_t b = 0; b < count; ++b) {
      const auto left = static_cast<std::int64_t>(rows[b].size - done_[b]);
      taken_[b] = std::min(left, width);
      finishing_[b] = static_cast<char>(left != 0 && left <= width);
      whole = whole && left <= width;
      std::int64_t* ids = input_ids_.values() + static_cast<std::int64_t>(b) * width;
      std::fill_n(ids, width, 0);
      std::copy_n(rows[b].data + done_[b], taken_[b], ids);
      if (length(b) == capacity_) ids[0] = held_[b].back();
    }
    run_step(static_cast<std::int64_t>(count), width, whole, finishing_);
    for (std::size_t b = 0; b < count; ++b) {
      if (taken_[b] == 0) continue;
      const Token* first_taken = rows[b].data + done_[b];
      held_[b].insert(held_[b].end(), first_taken, first_taken + taken_[b]);
      if (scale_) scale_->hold(b, requests_[b], static_cast<std::size_t>(taken_[b]));
      done_[b] += static_cast<std::size_t>(taken_[b]);
    }
  }
  const Memory& found = whole && device_->is_host() ? logits_ : host_logits_;
  return {static_cast<const float*>(found.get()), present_.data(), static_cast<int>(count),
          manifest().info.vocab_size};
}

/// Run the step whose tokens are in input_ids_: fill in the rest, issue it and wait for its logits.
void SessionCore::run_step(std::int64_t rows, std::int64_t width, bool whole,
                           const std::vector<char>& wanted) {
  std::int64_t end = 0;
  for (std::int64_t b = 0; b < rows; ++b) {
    const auto row = static_cast<std::size_t>(b);
    const std::int64_t start = std::min(length(row), capacity_ - 1);
    write_indices_.values()[b] = start;
    logits_indices_.values()[b] = std::max<std::int64_t>(taken_[row] - 1, 0);
    for (std::int64_t i = 0; i < width; ++i) position_ids_.values()[b * width + i] = start + i;
    if (scale_) {
      request_lengths_.values()[b] = scale_->of_step(row, requests_[row], length(row) == capacity_);
    }
    end = std::max(end, start + width);
  }
  span_ = span_of(end);
  const StepShape step{rows, width, span_};
  failed_ = true;  // until the step has finished
  const bool by_graph = width == 1 && cuda_graphs_ && issue_by_graph(step);
  if (!by_graph) {
    Steps& steps = executors_[profile_of(step)];
    if (!(step == steps.shape)) prepare(*steps.executor, step);
    steps.shape = step;
    issue(*steps.executor, step);
  }
  // On the host, prefill returns them where they are, unless a later step overwrites them.
  if (!(whole && device_->is_host())) fetch_logits(rows, wanted);
  device_->synchronize();
  failed_ = false;
}

/// Enqueue the copies of logits to the host: those of the rows that are wanted.
void SessionCore::fetch_logits(std::int64_t rows, const std::vector<char>& wanted) {
  const auto vocab = static_cast<std::size_t>(manifest().info.vocab_size);
  const auto* device = static_cast<const float*>(logits_.get());
  auto* host = static_cast<float*>(host_logits_.get());
  const auto count = static_cast<std::size_t>(rows);
  for (std::size_t begin = 0; begin < count;) {  // neighbours in one copy
    std::size_t end = begin;
    while (end < count && wanted[end] != 0) ++end;
    if (end != begin) {
      device_->copy_to_host(host + begin * vocab, device + begin * vocab,
                            (end - begin) * vocab * sizeof(float));
    }
    begin = end + 1;
  }
}

void SessionCore::reset() {
  for (int row = 0; row < max_batch(); ++row) truncate(0, row);
}

std::size_t SessionCore::reusable(std::size_t row, std::size_t prompt_length) const {
  if (!scale_) return held_[row].size();
  return scale_->reusable(row, static_cast<std::int64_t>(prompt_length));
}

void SessionCore::truncate(int length, int row) {
  if (row < 0 || row >= max_batch()) {
    throw Error(ErrorCode::invalid_argument, "row " + text(row) + " of a session of " + text(max_batch()));
  }
  std::vector<Token>& held = held_[static_cast<std::size_t>(row)];
  if (length < 0 || static_cast<std::size_t>(length) > held.size()) {
    throw Error(ErrorCode::invalid_argument, "row " + text(row) + " holds " + std::to_string(held.size()) +
                                                 " tokens; it cannot keep " + text(length));
  }
  held.resize(static_cast<std::size_t>(length));
  if (scale_) scale_->truncate(static_cast<std::size_t>(row), held.size());
}

}  // namespace qwenport::detail
