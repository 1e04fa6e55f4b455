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
  TensorRTExecutor(const CudaDevice& device, std::unique_ptr<nvinfer1::IExecutionContext> context,
                   std::mutex& contexts)
      : device_(device), contexts_(contexts), context_(std::move(context)) {}
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
  void enqueue() override {
    const CurrentGpu current(device_.gpu());
    if (!context_->enqueueV3(device_.stream())) refused("a step");
  }

 private:
  [[noreturn]] static void refused(const std::string& what) {
    throw Error(ErrorCode::device, "TensorRT refused " + what + tensorrt_complaint());
  }

  const CudaDevice& device_;
  std::mutex& contexts_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
};

class TensorRTModel final : public Model {
 public:
  TensorRTModel(Manifest manifest, const Gpu& gpu, std::unique_ptr<nvinfer1::IRuntime> runtime,
                std::unique_ptr<nvinfer1::ICudaEngine> engine)
      : Model(std::move(manifest)),
        gpu_(gpu),
        runtime_(std::move(runtime)),
        engine_(std::move(engine)),
        workspace_bytes_(engine_->getDeviceMemorySizeV2()) {}
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
  [[nodiscard]] int allocated_slots(int /*capacity*/) const override { return manifest().info.capacity; }
  [[nodiscard]] std::size_t workspace_bytes() const override {
    return static_cast<std::size_t>(workspace_bytes_);
  }
  [[nodiscard]] std::unique_ptr<Executor> make_executor(Device& device, void* workspace) const override {
    const CurrentGpu current(gpu_);
    const std::scoped_lock lock(contexts_);
    std::unique_ptr<nvinfer1::IExecutionContext> context(
        engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
    if (context == nullptr) {
      throw Error(ErrorCode::device, "TensorRT refused an execution context" + tensorrt_complaint());
    }
    context->setDeviceMemoryV2(workspace, workspace_bytes_);
    return std::make_unique<TensorRTExecutor>(static_cast<CudaDevice&>(device), std::move(context),
                                              contexts_);
  }

 private:
  Gpu gpu_;
  mutable std::mutex contexts_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::int64_t workspace_bytes_;
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
