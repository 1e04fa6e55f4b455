// The Device, Executor and Model of onnxruntime on the CPU.
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "../backends.hpp"
#include "../files.hpp"
#include "../target.hpp"
#include "contract.hpp"
#include "huge_pages.hpp"
#include "library.hpp"

namespace qwenport::detail {
namespace {

/// Host memory in pages that the system makes when they are first written: a cache costs what it holds.
class HostDevice final : public Device {
 public:
  [[nodiscard]] bool is_host() const noexcept override { return true; }

  void* allocate(std::size_t bytes) override {
    if (bytes == 0) return nullptr;
    void* const memory =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      throw Error(ErrorCode::device, "the system has no " + std::to_string(bytes) +
                                         " bytes left; give the session fewer rows or a smaller capacity");
    }
    madvise(memory, bytes, MADV_NOHUGEPAGE);  // one slot would cost two megabytes
    try {
      sizes_[memory] = bytes;
    } catch (...) {
      munmap(memory, bytes);
      throw;
    }
    return memory;
  }
  void release(void* memory) noexcept override {
    const auto found = sizes_.find(memory);
    if (found == sizes_.end()) return;
    munmap(memory, found->second);
    sizes_.erase(found);
  }
  void* allocate_pinned(std::size_t bytes) override { return allocate(bytes); }
  void release_pinned(void* memory) noexcept override { release(memory); }
  void copy_to_device(void* device, const void* pinned, std::size_t bytes) override {
    std::copy_n(static_cast<const std::byte*>(pinned), bytes, static_cast<std::byte*>(device));
  }
  void copy_to_host(void* pinned, const void* device, std::size_t bytes) override {
    copy_to_device(pinned, device, bytes);
  }
  void synchronize() override {}
  std::unique_ptr<Graph> capture(const std::function<void()>& /*work*/) override {
    throw Error(ErrorCode::device, "onnxruntime's steps cannot be captured");
  }

 private:
  std::map<void*, std::size_t> sizes_;
};

class OnnxRuntimeExecutor final : public Executor {
 public:
  OnnxRuntimeExecutor(const OnnxRuntime& runtime, ort::Session* session, const Manifest& manifest)
      : runtime_(runtime), session_(session), vocab_size_(manifest.info.vocab_size) {
    std::vector<const char*> integers{contract::input_ids, contract::position_ids, contract::write_indices,
                                      contract::key_positions, contract::logits_indices};
    if (manifest.unscaled_length) integers.push_back(contract::request_lengths);
    for (const char* name : integers) {
      tensors_.push_back({name, ort::ElementType::int64, /*is_output=*/false});
    }
    logits_ = tensors_.size();
    tensors_.push_back({contract::logits, ort::ElementType::float32, /*is_output=*/true});
    for (const CacheBinding& cache : manifest.caches) {  // a present after its past: shape() relies on it
      tensors_.push_back({cache.past, ort::ElementType::float32, /*is_output=*/false});
      tensors_.push_back({cache.present, ort::ElementType::float32, /*is_output=*/true});
    }
    for (std::size_t i = 0; i < tensors_.size(); ++i) index_[tensors_[i].name] = i;
    ort::IoBinding* binding = nullptr;
    runtime_.require<ort::CreateIoBinding>("a binding", session_, &binding);
    binding_ = runtime_.own<ort::ReleaseIoBinding>(binding);
  }

  void bind(const std::string& name, void* memory) override {
    Tensor& tensor = tensors_[index_.at(name)];
    if (tensor.memory == memory) return;
    tensor.memory = memory;
    tensor.is_bound = false;
    is_bound_ = false;
  }
  void shape(const std::string& name, const Shape& shape) override {
    const std::size_t index = index_.at(name);
    set_shape(tensors_[index], shape);
    if (index > logits_) set_shape(tensors_[index + 1], shape);  // the present of a past
    if (name == contract::logits_indices) {
      set_shape(tensors_[logits_], {3, {shape.sizes[0], shape.sizes[1], vocab_size_}});
    }
  }
  std::size_t workspace_bytes() override { return 0; }
  void set_workspace(void* /*memory*/, std::size_t /*bytes*/) override {}
  void enqueue() override {
    if (!is_bound_) {
      for (Tensor& tensor : tensors_) {
        if (!tensor.is_bound) bind_tensor(tensor);
      }
      is_bound_ = true;
    }
    runtime_.require<ort::RunWithBinding>("a step", session_, nullptr, binding_.get());
  }

 private:
  struct Tensor {
    std::string name;
    ort::ElementType type;
    bool is_output;
    void* memory = nullptr;
    Shape shape{};
    bool is_bound = false;  // this memory and shape
  };

  void set_shape(Tensor& tensor, const Shape& shape) {
    if (tensor.shape.rank == shape.rank && tensor.shape.sizes == shape.sizes) return;
    tensor.shape = shape;
    tensor.is_bound = false;
    is_bound_ = false;
  }

  void bind_tensor(Tensor& tensor) {
    const auto rank = static_cast<std::size_t>(tensor.shape.rank);
    std::size_t bytes = tensor.type == ort::ElementType::int64 ? sizeof(std::int64_t) : sizeof(float);
    for (std::size_t i = 0; i < rank; ++i) bytes *= static_cast<std::size_t>(tensor.shape.sizes[i]);
    ort::Value* made = nullptr;
    const char* const name = tensor.name.c_str();
    runtime_.require<ort::CreateTensorWithDataAsOrtValue>(
        name, runtime_.cpu(), tensor.memory, bytes, tensor.shape.sizes.data(), rank, tensor.type, &made);
    const auto value = runtime_.own<ort::ReleaseValue>(made);  // the binding keeps it
    if (tensor.is_output) {
      runtime_.require<ort::BindOutput>(name, binding_.get(), name, value.get());
    } else {
      runtime_.require<ort::BindInput>(name, binding_.get(), name, value.get());
    }
    tensor.is_bound = true;
  }

  const OnnxRuntime& runtime_;
  ort::Session* session_;
  std::int64_t vocab_size_;
  Owned<ort::IoBinding> binding_;
  std::vector<Tensor> tensors_;
  std::size_t logits_ = 0;  // in tensors_; the caches are behind it
  std::map<std::string, std::size_t> index_;
  bool is_bound_ = false;  // all of them
};

class OnnxRuntimeModel final : public Model {
 public:
  OnnxRuntimeModel(Manifest manifest, const OnnxRuntime& runtime, Owned<ort::Session> session)
      : Model(std::move(manifest)), runtime_(runtime), session_(std::move(session)) {}

  [[nodiscard]] std::unique_ptr<Device> make_device() const override {
    return std::make_unique<HostDevice>();
  }
  [[nodiscard]] Machine machine() const override { return {"cpu", "-", runtime_.version()}; }
  [[nodiscard]] int allocated_slots(int capacity) const override { return capacity; }
  [[nodiscard]] std::unique_ptr<Executor> make_executor(Device& /*device*/, int /*profile*/) const override {
    return std::make_unique<OnnxRuntimeExecutor>(runtime_, session_.get(), manifest());
  }

 private:
  const OnnxRuntime& runtime_;
  Owned<ort::Session> session_;
};

Owned<ort::SessionOptions> session_options(const OnnxRuntime& runtime, const EngineOptions& given) {
  ort::SessionOptions* made = nullptr;
  runtime.require<ort::CreateSessionOptions>("session options", &made);
  auto options = runtime.own<ort::ReleaseSessionOptions>(made);
  const auto set = [&](const char* key, const char* value) {
    runtime.require<ort::AddSessionConfigEntry>(key, options.get(), key, value);
  };
  if (given.threads != 0) {
    runtime.require<ort::SetIntraOpNumThreads>("the number of threads", options.get(), given.threads);
  }
  // A large vocabulary matrix passes the default limit, and would be computed again in each step.
  set("optimization.constant_folding_max_output_size_in_bytes", "4611686018427387904");
  if (given.load == LoadMode::fast_start) set("session.disable_prepacking", "1");
  return options;
}

}  // namespace

std::shared_ptr<const Model> load_onnxruntime(Manifest manifest, const std::string& directory,
                                              const EngineOptions& options) {
  if (options.threads < 0 || options.threads > contract::most_threads) {
    throw Error(ErrorCode::invalid_argument, "threads must be in [0, " +
                                                 std::to_string(contract::most_threads) + "], got " +
                                                 std::to_string(options.threads));
  }
  if (options.load != LoadMode::fast_steps && options.load != LoadMode::fast_start) {
    throw Error(ErrorCode::invalid_argument,
                "no such load mode: " + std::to_string(static_cast<int>(options.load)));
  }
  const OnnxRuntime& runtime = OnnxRuntime::get(options.onnxruntime);
  check_oldest_version(manifest, directory, runtime.version());
  const std::string path = directory + "/" + manifest.model.name;
  check_file(manifest.model, directory, MappedFile(path));
  check_weights(manifest.weights, directory, MappedFile(directory + "/" + manifest.weights.name));
  const auto session_with = session_options(runtime, options);
  const bool few_bits = manifest.info.activations == contract::int8;
  const HugePages huge_pages;
  ort::Session* session = nullptr;
  const std::string failure =
      runtime.attempt<ort::CreateSession>(runtime.env(), path.c_str(), session_with.get(), &session);
  if (!failure.empty()) {
    throw Error(ErrorCode::bad_engine,
                path + ": onnxruntime " + runtime.version() + " does not load it: " + failure);
  }
  auto loaded = runtime.own<ort::ReleaseSession>(session);
  if (few_bits) huge_pages.move_new_memory();
  return std::make_shared<OnnxRuntimeModel>(std::move(manifest), runtime, std::move(loaded));
}

}  // namespace qwenport::detail
