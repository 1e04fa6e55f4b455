// The executors of a SessionCore: shapes, workspace, CUDA graphs.
#include <algorithm>
#include <string>

#include "contract.hpp"
#include "session.hpp"
#include "spans.hpp"

namespace qwenport::detail {

/// The first profile that admits a step; their number if none does.
std::size_t SessionCore::profile_of(const StepShape& step) const {
  const std::vector<Profile>& profiles = manifest().profiles;
  const auto found = std::find_if(profiles.begin(), profiles.end(), [&step](const Profile& each) {
    return each.least <= step.width && step.width <= each.tokens && step.span <= each.span;
  });
  return static_cast<std::size_t>(found - profiles.begin());
}

/// Whether there is memory for a step of several tokens per row.
bool SessionCore::fits(const StepShape& step) const {
  return scores_fit(step.rows, step.width, step.span, manifest().score_bytes, contract::most_scores) &&
         profile_of(step) != manifest().profiles.size();
}

/// Allocate the workspace for this session's largest step of each profile, which is less than the engine's.
void SessionCore::reserve_workspace() {
  std::size_t most = 0;
  for (std::size_t i = 0; i < executors_.size(); ++i) {
    const Profile& profile = manifest().profiles[i];
    const std::int64_t longest = std::min<std::int64_t>(profile.span, span_of(capacity_));
    const std::int64_t span = span_within(longest, manifest().attention.span_multiple, slots_);
    const std::int64_t width = std::min(profile.tokens, max_step_tokens_);
    if (width < profile.least || span == 0) continue;
    Executor& executor = *executors_[i].executor;
    set_shapes(executor, {static_cast<std::int64_t>(held_.size()), width, span});
    most = std::max(most, executor.workspace_bytes());
  }
  grow_workspace(most, nullptr);
}

/// Replace the workspace. Every executor but `keep` has to be prepared again, and graphs are captured again.
void SessionCore::grow_workspace(std::size_t bytes, const Executor* keep) {
  for (Steps& steps : executors_) steps.shape = {};
  for (Bucket& bucket : buckets_) {
    bucket.graph.reset();
    if (bucket.executor.get() != keep) bucket.executor.reset();
  }
  workspace_bytes_ = 0;
  workspace_ = {};
  workspace_ = device_memory(bytes);
  workspace_bytes_ = bytes;
}

std::unique_ptr<Executor> SessionCore::make_executor(std::size_t profile) {
  auto executor = model_->make_executor(*device_, static_cast<int>(profile));
  for (const Input* input :
       {&input_ids_, &position_ids_, &write_indices_, &key_positions_, &logits_indices_, &request_lengths_}) {
    if (input->name != nullptr) executor->bind(input->name, input->address());
  }
  executor->bind(contract::logits, logits_.get());
  for (std::size_t i = 0; i < caches_.size(); ++i) {  // past and present are the same memory
    executor->bind(manifest().caches[i].past, caches_[i].get());
    executor->bind(manifest().caches[i].present, caches_[i].get());
  }
  for (const std::string& query : manifest().queries) executor->bind(query, queries_.get());
  return executor;
}

/// Issue a single-token step through its bucket. False if the device refuses what that needs (memory for
/// another execution context, a capture): the session continues without graphs, from this step on, which
/// writes again to the same places what it may already have written.
bool SessionCore::issue_by_graph(const StepShape& step) {
  try {
    Bucket& decode = bucket(step);
    if (decode.graph != nullptr) {
      decode.graph->launch();
      return true;
    }
    if (decode.executor != nullptr) {
      decode.graph = device_->capture([&] { issue(*decode.executor, step); });
      decode.graph->launch();
      return true;
    }
    decode.executor = make_executor(profile_of(step));
    prepare(*decode.executor, step);
    issue(*decode.executor, step);  // TensorRT requires one run before a capture
    return true;
  } catch (const Error& error) {
    if (error.code() != ErrorCode::device) throw;
    device_->synchronize();  // what was issued still uses them
    buckets_.clear();
    cuda_graphs_ = false;
    return false;
  }
}

/// Set an executor's shapes and its workspace.
void SessionCore::prepare(Executor& executor, const StepShape& step) {
  set_shapes(executor, step);
  const std::size_t needed = executor.workspace_bytes();
  if (needed > workspace_bytes_) grow_workspace(needed, &executor);
  executor.set_workspace(workspace_.get(), workspace_bytes_);
}

void SessionCore::set_shapes(Executor& executor, const StepShape& step) const {
  executor.shape(contract::input_ids, {2, {step.rows, step.width}});
  executor.shape(contract::position_ids, {2, {step.rows, step.width}});
  executor.shape(contract::write_indices, {1, {step.rows}});
  executor.shape(contract::key_positions, {1, {step.span}});
  executor.shape(contract::logits_indices, {2, {step.rows, 1}});
  if (scale_) executor.shape(contract::request_lengths, {1, {step.rows}});
  const Shape cache{4, {step.rows, manifest().kv_heads, slots_, manifest().head_dim}};
  for (const CacheBinding& binding : manifest().caches) executor.shape(binding.past, cache);
}

/// Enqueue a step: inputs to the device, the network.
void SessionCore::issue(Executor& executor, const StepShape& step) {
  const auto count = static_cast<std::size_t>(step.rows);
  const std::size_t tokens = count * static_cast<std::size_t>(step.width);
  upload(input_ids_, tokens);
  upload(position_ids_, tokens);
  upload(write_indices_, count);
  upload(logits_indices_, count);
  if (scale_) upload(request_lengths_, count);
  executor.enqueue();
}

/// The bucket of a shape; a new one replaces the least recently used if there are too many.
SessionCore::Bucket& SessionCore::bucket(const StepShape& step) {
  auto found =
      std::find_if(buckets_.begin(), buckets_.end(), [&step](const Bucket& b) { return b.shape == step; });
  if (found == buckets_.end()) {
    if (buckets_.size() == max_graphs) {
      buckets_.erase(std::min_element(buckets_.begin(), buckets_.end(), [](const Bucket& a, const Bucket& b) {
        return a.last_use < b.last_use;
      }));
    }
    found = buckets_.emplace(buckets_.end());
    found->shape = step;
  }
  found->last_use = ++steps_;
  return *found;
}

}  // namespace qwenport::detail
