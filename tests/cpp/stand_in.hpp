// A machine without a GPU: the Device, Executor and Model that src/tensorrt has, on host memory.
//
// It is as unforgiving as a GPU, and tells: work given to the stream runs when somebody waits for it, an
// executor sees the shapes and addresses of the moment it was enqueued, every copy must lie inside an
// allocation of its kind, and a graph replays exactly what was captured.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "backend.hpp"

namespace stand_in {

/// Allocations of operator new that this thread made outside the stand-in.
extern thread_local long allocations;
/// What is allocated while one lives is the stand-in's own affair.
class Uncounted {
 public:
  Uncounted() : before_(allocations) {}
  ~Uncounted() { allocations = before_; }
  Uncounted(const Uncounted&) = delete;
  Uncounted& operator=(const Uncounted&) = delete;

 private:
  long before_;
};

/// The runtime did what no GPU would forgive.
struct Misuse : std::logic_error {
  using std::logic_error::logic_error;
};

/// Bindings and shapes of a step.
struct Call {
  std::map<std::string, void*> memory;
  std::map<std::string, std::vector<std::int64_t>> shapes;

  [[nodiscard]] const std::int64_t* ints(const std::string& name) const {
    return static_cast<const std::int64_t*>(memory.at(name));
  }
  [[nodiscard]] std::int64_t rows() const { return shapes.at("input_ids").at(0); }
  [[nodiscard]] std::int64_t width() const { return shapes.at("input_ids").at(1); }
  [[nodiscard]] std::int64_t span() const { return shapes.at("key_positions").at(0); }
};

/// What a step computes. One a device, so that it may remember.
using Network = std::function<void(const Call&)>;

/// What the devices of a model did, all together.
struct Counts {
  // what the devices are to refuse from now on
  std::atomic<bool> no_captures{false};
  std::atomic<long> most_executors{1000};
  std::atomic<long> odd_workspace{0};  // bytes that single-token steps over 128 slots need in addition
  std::atomic<long> steps{0};
  std::atomic<long> synchronisations{0};
  std::atomic<long> captures{0};
  std::atomic<long> launches{0};
  std::atomic<long> executors{0};
  std::atomic<long> device_allocations{0};
  std::atomic<long> device_bytes{0};  // now
  std::atomic<long> bytes_to_host{0};
};

class StandInDevice final : public qwenport::detail::Device {
 public:
  StandInDevice(Network network, Counts& counts) : network_(std::move(network)), counts_(counts) {}
  ~StandInDevice() override;
  StandInDevice(const StandInDevice&) = delete;
  StandInDevice& operator=(const StandInDevice&) = delete;

  void* allocate(std::size_t bytes) override;
  void release(void* memory) noexcept override;
  void* allocate_pinned(std::size_t bytes) override;
  void release_pinned(void* memory) noexcept override;
  void copy_to_device(void* device, const void* pinned, std::size_t bytes) override;
  void copy_to_host(void* pinned, const void* device, std::size_t bytes) override;
  void synchronize() override;
  std::unique_ptr<qwenport::detail::Graph> capture(const std::function<void()>& work) override;

  void run(const Call& call);
  void submit(std::function<void()> work);
  [[nodiscard]] Counts& counts() noexcept { return counts_; }
  /// Fail if [memory, memory + bytes) is not inside one allocation of device memory.
  void check_device(const void* memory, std::size_t bytes) const;

 private:
  using Ranges = std::map<const char*, std::size_t>;
  static void check_inside(const Ranges& ranges, const void* memory, std::size_t bytes, const char* kind);

  Network network_;
  Counts& counts_;
  Ranges device_;
  Ranges pinned_;
  std::vector<std::function<void()>> queue_;
  std::unique_ptr<std::vector<std::function<void()>>> captured_;
};

class StandInModel final : public qwenport::detail::Model {
 public:
  /// \param make_network called for every device.
  StandInModel(qwenport::detail::Manifest manifest, std::function<Network()> make_network)
      : Model(std::move(manifest)), make_network_(std::move(make_network)) {}

  [[nodiscard]] std::unique_ptr<qwenport::detail::Device> make_device() const override;
  [[nodiscard]] qwenport::detail::Machine machine() const override {
    return {"GPU-stand-in", "1.0", "10.14.1.48"};
  }
  [[nodiscard]] int allocated_slots(int /*capacity*/) const override { return manifest().attention.slots; }
  [[nodiscard]] std::unique_ptr<qwenport::detail::Executor> make_executor(qwenport::detail::Device& device,
                                                                          int profile) const override;
  [[nodiscard]] Counts& counts() const noexcept { return *counts_; }

 private:
  std::function<Network()> make_network_;
  std::unique_ptr<Counts> counts_ = std::make_unique<Counts>();
};

/// The workspace that a step of these shapes needs.
std::size_t workspace_bytes(const Call& call, const Counts& counts);

/// Fail unless a step is one that a network of this manifest takes: shapes inside the profile, past and
/// present at one address, positions and slots that agree, a span that covers them.
void check_call(const qwenport::detail::Manifest& manifest, const Call& call);

/// A network whose logits tell everything that a row's cache holds: see toy_network.cpp.
Network toy_network(const qwenport::detail::Manifest& manifest);

/// A network that plays back the steps of a recording and takes no other: see recording.cpp.
/// \param path of what tests/cpp/recording.py wrote.
Network recorded_network(const qwenport::detail::Manifest& manifest, const std::string& path);

/// The manifest of a small engine for toy_network.
/// \param form of its attention; its cache has as many slots as that asks for.
/// \param two_profiles one for single tokens, before the one for all steps.
std::string toy_manifest_text(int capacity = 160, int max_batch = 4, int max_step_tokens = 24, int vocab = 97,
                              const std::string& form = "masked", bool two_profiles = false);

std::shared_ptr<const StandInModel> toy_model(int capacity = 160, int max_batch = 4, int max_step_tokens = 24,
                                              const std::string& form = "masked", bool two_profiles = false);

/// \param score_bytes as of an engine for onnxruntime.
std::shared_ptr<const StandInModel> toy_model_of(const std::string& manifest_text,
                                                 std::int64_t score_bytes = 0);

/// The manifest of toy_manifest_text, with other profiles.
std::string with_profiles(std::string manifest, int max_batch,
                          const std::vector<qwenport::detail::Profile>& profiles);

/// The manifest of toy_manifest_text, with dual chunk attention.
/// \param unscaled_length longer requests scale keys; 0: none do.
std::string with_dual_chunk(std::string manifest, int unscaled_length);

/// The logits [vocab] of toy_network after these tokens, from its definition.
/// \param requests if lengths scale keys, for each token the length that its key is scaled for.
std::vector<float> toy_logits(const qwenport::detail::Manifest& manifest,
                              const std::vector<std::int64_t>& tokens,
                              const std::vector<std::int64_t>& requests = {});

}  // namespace stand_in
