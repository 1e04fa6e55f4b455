// What a session needs from a machine, as two small interfaces: memory and a stream (Device); bindings,
// shapes and a step (Executor). src/tensorrt has them for CUDA and TensorRT, src/onnxruntime for the CPU; the
// tests provide a stand-in for a GPU. A Model is an engine that creates them.
//
// All work of a Device runs in order on its one stream. Copies are asynchronous: their host memory must
// come from allocate_pinned and stay unchanged until synchronize.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "manifest.hpp"

namespace qwenport::detail {

/// Work captured once, to be replayed on the stream it was captured on.
class Graph {
 public:
  Graph() = default;
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  virtual ~Graph() = default;
  virtual void launch() = 0;
};

class Device {
 public:
  Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  virtual ~Device() = default;

  /// Whether the network computes in host memory. Then one allocation serves as both kinds, nothing has to be
  /// copied, and work is done when the call that issues it returns.
  [[nodiscard]] virtual bool is_host() const noexcept { return false; }

  /// Device memory, zeroed, aligned to 256 bytes.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void release(void* memory) noexcept = 0;
  /// Page-locked host memory.
  virtual void* allocate_pinned(std::size_t bytes) = 0;
  virtual void release_pinned(void* memory) noexcept = 0;

  virtual void copy_to_device(void* device, const void* pinned, std::size_t bytes) = 0;
  virtual void copy_to_host(void* pinned, const void* device, std::size_t bytes) = 0;
  /// Wait for all work on the stream.
  virtual void synchronize() = 0;

  /// Capture the work that `work` puts on the stream, without running it. If it throws, nothing is
  /// captured and the stream is unchanged.
  virtual std::unique_ptr<Graph> capture(const std::function<void()>& work) = 0;
};

/// The sizes of a tensor of up to four dimensions.
struct Shape {
  int rank = 0;
  std::array<std::int64_t, 4> sizes{};
};

/// One execution context of the network: its addresses and shapes stay until set again.
class Executor {
 public:
  Executor() = default;
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;
  virtual ~Executor() = default;

  virtual void bind(const std::string& name, void* memory) = 0;
  virtual void shape(const std::string& name, const Shape& shape) = 0;
  /// Device memory that a step of the shapes of now needs as workspace.
  virtual std::size_t workspace_bytes() = 0;
  /// Executors that never run concurrently may share it.
  virtual void set_workspace(void* memory, std::size_t bytes) = 0;
  /// Run a step on the device's stream.
  virtual void enqueue() = 0;
};

/// Where an engine runs, in the words of a remembered self-test (docs/reference/proof.md).
struct Machine {
  std::string device;           ///< "cpu", or a GPU's UUID
  std::string driver;           ///< "-" for the CPU
  std::string runtime_version;  ///< of the library that is loaded
};

/// A loaded engine. Its methods may be called from several threads at once.
class Model {
 public:
  explicit Model(Manifest manifest) : manifest_(std::move(manifest)) {}
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;
  virtual ~Model() = default;

  [[nodiscard]] const Manifest& manifest() const noexcept { return manifest_; }
  [[nodiscard]] virtual std::unique_ptr<Device> make_device() const = 0;
  [[nodiscard]] virtual Machine machine() const = 0;
  /// The slots of a cache for a session that uses `capacity` of them: more if the engine fixes its length.
  [[nodiscard]] virtual int allocated_slots(int capacity) const = 0;
  /// \param profile its place in the manifest's list; the executor's shapes must be within it.
  [[nodiscard]] virtual std::unique_ptr<Executor> make_executor(Device& device, int profile) const = 0;

 private:
  Manifest manifest_;
};

}  // namespace qwenport::detail
