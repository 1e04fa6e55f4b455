// The Model and Executor of TensorRT.
#include <mutex>

#include "backends.hpp"
#include "cuda.hpp"
#include "files.hpp"
#include "library.hpp"
#include "target.hpp"

namespace qwenport::detail {
namespace {

class TensorRTExecutor final : public Executor {
 public:
  /// \param contexts held while an execution context is made or destroyed.
  /// \param most_workspace bytes that are enough for all shapes.
  TensorRTExecutor(const CudaDevice& device, std::unique_ptr<nvinfer1::IExecutionContext> context,
                   int profile, std::int64_t most_workspace, std::mutex& contexts)
      : device_(device),
        most_workspace_(static_cast<std::size_t>(most_workspace)),
        contexts_(contexts),
        context_(std::move(context)) {
    const CurrentGpu current(device_.gpu());
    if (profile != 0 && !context_->setOptimizationProfileAsync(profile, device_.stream())) {
      refused("profile " + std::to_string(profile));
    }
  }
  ~TensorRTExecutor() override {
    const CurrentGpu current(device_.gpu());
    const std::scoped_lock lock(contexts_);
    context_.reset();
  }
  TensorRTExecutor(const TensorRTExecutor&) = delete;
  TensorRTExecutor& operator=(const TensorRTExecutor&) = delete;

  void bind(const std::string& name, void* memory) override {
    if (!context_->setTensorAddress(name.c_str(), memory)) refused("the address of " + name);
  }
  void shape(const std::string& name, const Shape& shape) override {
    nvinfer1::Dims dims{};
    dims.nbDims = shape.rank;
    for (std::size_t i = 0; i < static_cast<std::size_t>(shape.rank); ++i) dims.d[i] = shape.sizes[i];
    if (!context_->setInputShape(name.c_str(), dims)) refused("the shape of " + name);
  }
  std::size_t workspace_bytes() override {
    const CurrentGpu current(device_.gpu());
    const std::size_t bytes = context_->updateDeviceMemorySizeForShapes();
    return bytes != 0 ? bytes : most_workspace_;  // 0: it cannot say
  }
  void set_workspace(void* memory, std::size_t bytes) override {
    const CurrentGpu current(device_.gpu());
    context_->setDeviceMemoryV2(memory, static_cast<std::int64_t>(bytes));
  }
  void enqueue() override {
    const CurrentGpu current(device_.gpu());
    if (!context_->enqueueV3(device_.stream())) refused("a step");
  }

 private:
  [[noreturn]] static void refused(const std::string& what) {
    throw Error(ErrorCode::device, "TensorRT refused " + what + tensorrt_complaint());
  }

  const CudaDevice& device_;
  std::size_t most_workspace_;
  std::mutex& contexts_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
};

class TensorRTModel final : public Model {
 public:
  TensorRTModel(Manifest manifest, const Gpu& gpu, std::unique_ptr<nvinfer1::IRuntime> runtime,
                std::unique_ptr<nvinfer1::ICudaEngine> engine)
      : Model(std::move(manifest)), gpu_(gpu), runtime_(std::move(runtime)), engine_(std::move(engine)) {}
  ~TensorRTModel() override {
    const CurrentGpu current(gpu_);
    engine_.reset();
    runtime_.reset();
  }
  TensorRTModel(const TensorRTModel&) = delete;
  TensorRTModel& operator=(const TensorRTModel&) = delete;

  [[nodiscard]] std::unique_ptr<Device> make_device() const override {
    return std::make_unique<CudaDevice>(gpu_);
  }
  [[nodiscard]] Machine machine() const override {  // load_tensorrt compared the version with the library's
    return {gpu_uuid(gpu_.number()), driver_version(), manifest().info.runtime_version};
  }
  [[nodiscard]] int allocated_slots(int /*capacity*/) const override { return manifest().attention.slots; }
  [[nodiscard]] std::unique_ptr<Executor> make_executor(Device& device, int profile) const override {
    const CurrentGpu current(gpu_);
    const std::scoped_lock lock(contexts_);
    std::unique_ptr<nvinfer1::IExecutionContext> context(
        engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
    if (context == nullptr) {
      throw Error(ErrorCode::device, "TensorRT refused an execution context" + tensorrt_complaint());
    }
    return std::make_unique<TensorRTExecutor>(static_cast<CudaDevice&>(device), std::move(context), profile,
                                              engine_->getDeviceMemorySizeForProfileV2(profile), contexts_);
  }

 private:
  Gpu gpu_;
  mutable std::mutex contexts_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
};

void load_plugins(const Manifest& manifest, const std::string& directory, nvinfer1::IRuntime& runtime) {
  for (const FileRecord& plugin : manifest.plugins) {
    const std::string path = directory + "/" + plugin.name;
    {
      const MappedFile file(path);
      check_file(plugin, directory, file);
    }
    if (runtime.getPluginRegistry().loadLibrary(path.c_str()) == nullptr) {
      throw Error(ErrorCode::missing_library,
                  path +
                      ": TensorRT cannot load these plugins, or plugins of these names are loaded already" +
                      tensorrt_complaint());
    }
  }
}

}  // namespace

std::shared_ptr<const Model> load_tensorrt(Manifest manifest, const std::string& directory,
                                           const EngineOptions& options) {
  const TensorRTLibrary& tensorrt = TensorRTLibrary::get();
  check_version(manifest, directory, tensorrt.version());
  check_gpu(manifest, directory, gpu_architecture(options.gpu, gpu_list(manifest)));
  const MappedFile plan(directory + "/" + manifest.model.name);
  check_file(manifest.model, directory, plan);
  const Gpu device(options.gpu);
  const CurrentGpu current(device);
  std::unique_ptr<nvinfer1::IRuntime> runtime = tensorrt.make_runtime();
  load_plugins(manifest, directory, *runtime);
  std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime->deserializeCudaEngine(plan.data(), plan.size()));
  if (engine == nullptr) {
    throw Error(ErrorCode::device, directory + ": TensorRT refused the plan" + tensorrt_complaint());
  }
  return std::make_shared<TensorRTModel>(std::move(manifest), device, std::move(runtime), std::move(engine));
}

}  // namespace qwenport::detail
