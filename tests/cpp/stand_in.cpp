#include "stand_in.hpp"

#include <algorithm>
#include <cstring>

namespace stand_in {

using qwenport::detail::Manifest;
using qwenport::detail::Profile;

thread_local long allocations = 0;

namespace {

class StandInGraph final : public qwenport::detail::Graph {
 public:
  StandInGraph(StandInDevice& device, std::vector<std::function<void()>> work)
      : device_(device), work_(std::move(work)) {}
  void launch() override {
    const Uncounted uncounted;
    ++device_.counts().launches;
    for (const auto& work : work_) device_.submit(work);
  }

 private:
  StandInDevice& device_;
  std::vector<std::function<void()>> work_;
};

class StandInExecutor final : public qwenport::detail::Executor {
 public:
  StandInExecutor(StandInDevice& device, const Manifest& manifest, int profile)
      : device_(device),
        manifest_(manifest),
        profile_(manifest.profiles.at(static_cast<std::size_t>(profile))) {
    if (++device.counts().executors > device.counts().most_executors) {
      throw qwenport::Error(qwenport::ErrorCode::device, "no memory for an executor");
    }
  }
  void bind(const std::string& name, void* memory) override {
    const Uncounted uncounted;
    call_.memory[name] = memory;
  }
  void shape(const std::string& name, const qwenport::detail::Shape& shape) override {
    const Uncounted uncounted;
    call_.shapes[name].assign(shape.sizes.begin(), shape.sizes.begin() + shape.rank);
  }
  std::size_t workspace_bytes() override {
    const Uncounted uncounted;
    return stand_in::workspace_bytes(call_, device_.counts());
  }
  void set_workspace(void* memory, std::size_t bytes) override {
    workspace_ = memory;
    workspace_bytes_ = bytes;
  }
  void enqueue() override {
    const Uncounted uncounted;
    if (call_.width() < profile_.least || call_.width() > profile_.tokens || call_.span() > profile_.span) {
      throw Misuse("a step that its profile does not admit");
    }
    if (workspace_bytes_ < workspace_bytes()) throw Misuse("a workspace that is too small");
    for (const std::string& query : manifest_.queries) {
      const auto heads = static_cast<std::size_t>(call_.rows() * call_.width() * manifest_.heads);
      device_.check_device(call_.memory.at(query), heads * manifest_.slot_bytes());
    }
    device_.submit([&device = device_, call = call_, workspace = workspace_, bytes = workspace_bytes_] {
      device.check_device(workspace, bytes);  // a graph keeps its address
      device.run(call);
    });
  }

 private:
  StandInDevice& device_;
  const Manifest& manifest_;
  Profile profile_;
  void* workspace_ = nullptr;
  std::size_t workspace_bytes_ = 0;
  Call call_;
};

}  // namespace

StandInDevice::~StandInDevice() {
  if (!device_.empty() || !pinned_.empty()) std::abort();  // a leak; a destructor cannot say it otherwise
}

void* StandInDevice::allocate(std::size_t bytes) {
  const Uncounted uncounted;
  if (captured_) throw Misuse("an allocation during a capture");
  auto* memory = static_cast<char*>(std::aligned_alloc(256, (bytes + 256) / 256 * 256));
  std::memset(memory, 0, bytes);
  device_[memory] = bytes;
  counts_.device_bytes += static_cast<long>(bytes);
  ++counts_.device_allocations;
  return memory;
}

void StandInDevice::release(void* memory) noexcept {
  counts_.device_bytes -= static_cast<long>(device_.at(static_cast<char*>(memory)));
  device_.erase(static_cast<char*>(memory));
  std::free(memory);
}

void* StandInDevice::allocate_pinned(std::size_t bytes) {
  const Uncounted uncounted;
  if (captured_) throw Misuse("an allocation during a capture");
  auto* memory = static_cast<char*>(std::malloc(bytes));
  std::memset(memory, 0xEE, bytes);  // nobody may count on zeros
  pinned_[memory] = bytes;
  return memory;
}

void StandInDevice::release_pinned(void* memory) noexcept {
  pinned_.erase(static_cast<char*>(memory));
  std::free(memory);
}

void StandInDevice::copy_to_device(void* device, const void* pinned, std::size_t bytes) {
  const Uncounted uncounted;
  check_inside(device_, device, bytes, "device");
  check_inside(pinned_, pinned, bytes, "pinned");
  submit([=] { std::memcpy(device, pinned, bytes); });
}

void StandInDevice::copy_to_host(void* pinned, const void* device, std::size_t bytes) {
  const Uncounted uncounted;
  check_inside(device_, device, bytes, "device");
  check_inside(pinned_, pinned, bytes, "pinned");
  counts_.bytes_to_host += static_cast<long>(bytes);
  submit([=] { std::memcpy(pinned, device, bytes); });
}

void StandInDevice::synchronize() {
  const Uncounted uncounted;
  if (captured_) throw Misuse("waiting during a capture");
  ++counts_.synchronisations;
  const auto work = std::move(queue_);
  queue_.clear();
  for (const auto& item : work) item();
}

std::unique_ptr<qwenport::detail::Graph> StandInDevice::capture(const std::function<void()>& work) {
  const Uncounted uncounted;
  if (captured_) throw Misuse("a capture in a capture");
  captured_ = std::make_unique<std::vector<std::function<void()>>>();
  try {
    work();
    if (counts_.no_captures) throw qwenport::Error(qwenport::ErrorCode::device, "no capture");
  } catch (...) {
    captured_.reset();
    throw;
  }
  ++counts_.captures;
  const auto recorded = std::move(captured_);
  return std::make_unique<StandInGraph>(*this, std::move(*recorded));
}

void StandInDevice::run(const Call& call) {
  ++counts_.steps;
  network_(call);
}

void StandInDevice::submit(std::function<void()> work) {
  (captured_ ? *captured_ : queue_).push_back(std::move(work));
}

void StandInDevice::check_device(const void* memory, std::size_t bytes) const {
  check_inside(device_, memory, bytes, "device");
}

void StandInDevice::check_inside(const Ranges& ranges, const void* memory, std::size_t bytes,
                                 const char* kind) {
  const auto* begin = static_cast<const char*>(memory);
  auto after = ranges.upper_bound(begin);
  if (after != ranges.begin()) {
    --after;
    if (begin + bytes <= after->first + after->second) return;
  }
  throw Misuse(std::string("memory that is no ") + kind + " memory");
}

std::unique_ptr<qwenport::detail::Device> StandInModel::make_device() const {
  return std::make_unique<StandInDevice>(make_network_(), *counts_);
}

std::unique_ptr<qwenport::detail::Executor> StandInModel::make_executor(qwenport::detail::Device& device,
                                                                        int profile) const {
  return std::make_unique<StandInExecutor>(dynamic_cast<StandInDevice&>(device), manifest(), profile);
}

std::size_t workspace_bytes(const Call& call, const Counts& counts) {
  const std::int64_t tokens = call.rows() * call.width();
  const std::int64_t extra = call.width() == 1 && call.span() == 128 ? counts.odd_workspace.load() : 0;
  return static_cast<std::size_t>(256 + 4 * tokens * call.span() + extra);
}

void check_call(const Manifest& manifest, const Call& call) {
  const auto expect = [](bool holds, const char* what) {
    if (!holds) throw Misuse(what);
  };
  const std::int64_t rows = call.rows();
  const std::int64_t width = call.width();
  const std::int64_t span = call.span();
  const std::int64_t slots = manifest.attention.slots;
  expect(rows >= 1 && rows <= manifest.info.max_batch, "rows outside the profile");
  expect(width >= 1 && width <= manifest.info.max_step_tokens, "tokens outside the profile");
  expect(call.shapes.at("position_ids") == std::vector<std::int64_t>{rows, width}, "shape of position_ids");
  expect(call.shapes.at("write_indices") == std::vector<std::int64_t>{rows}, "shape of write_indices");
  expect(call.shapes.at("logits_indices") == std::vector<std::int64_t>{rows, 1}, "shape of logits_indices");
  expect(span <= slots, "a span outside the cache");
  expect(span % manifest.attention.span_multiple == 0 || span == slots, "a span of a size of its own");
  for (std::int64_t i = 0; i < span; ++i) expect(call.ints("key_positions")[i] == i, "key_positions");
  if (manifest.unscaled_length) {
    expect(call.shapes.at("request_lengths") == std::vector<std::int64_t>{rows}, "shape of request_lengths");
    for (std::int64_t b = 0; b < rows; ++b) {
      expect(call.ints("request_lengths")[b] >= *manifest.unscaled_length, "a length below the unscaled one");
    }
  }
  if (width > 1 && manifest.score_bytes != 0) {  // memory of 1 GiB
    expect(rows * width * span <= 1073741824 / manifest.score_bytes, "too wide a step");
  }
  for (std::int64_t b = 0; b < rows; ++b) {
    const std::int64_t start = call.ints("write_indices")[b];
    expect(start >= 0 && start + width <= span, "a slot outside the span");
    const std::int64_t wanted = call.ints("logits_indices")[b];
    expect(wanted >= 0 && wanted < width, "logits of a token outside the step");
    for (std::int64_t i = 0; i < width; ++i) {
      expect(call.ints("position_ids")[b * width + i] == start + i, "a position that is not its slot");
      const std::int64_t id = call.ints("input_ids")[b * width + i];
      expect(id >= 0 && id < manifest.info.vocab_size, "a token outside the vocabulary");
    }
  }
  const std::vector<std::int64_t> cache{rows, manifest.kv_heads, slots, manifest.head_dim};
  std::vector<void*> addresses;
  for (const auto& binding : manifest.caches) {
    expect(call.shapes.at(binding.past) == cache, "shape of a cache");
    expect(call.memory.at(binding.past) == call.memory.at(binding.present), "past and present apart");
    addresses.push_back(call.memory.at(binding.past));
  }
  if (!manifest.queries.empty()) addresses.push_back(call.memory.at(manifest.queries.front()));
  for (const std::string& query : manifest.queries) {
    expect(call.memory.at(query) == addresses.back(), "queries in several places");
  }
  std::sort(addresses.begin(), addresses.end());
  expect(std::unique(addresses.begin(), addresses.end()) == addresses.end(), "two caches in one place");
}

}  // namespace stand_in
