// Plugins as C functions, for the benchmark: it opens one as TensorRT does at run time, and then only enqueues.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

using namespace nvinfer1;

namespace {

class Log final : public ILogger {
 public:
  void log(Severity severity, const char* text) noexcept override {
    if (severity <= Severity::kERROR) std::fprintf(stderr, "%s\n", text);
  }
};
class LogFinder final : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &log_; }

 private:
  Log log_;
};

struct Tensor {
  std::int32_t type;  // of DataType
  std::int32_t rank;
  std::int64_t sizes[8];
};

std::vector<DynamicPluginTensorDesc> descriptions(const Tensor* tensors, int count) {
  std::vector<DynamicPluginTensorDesc> all;
  for (int i = 0; i < count; ++i) {
    PluginTensorDesc desc{};
    desc.type = static_cast<DataType>(tensors[i].type);
    desc.format = TensorFormat::kLINEAR;
    desc.dims.nbDims = tensors[i].rank;
    std::memcpy(desc.dims.d, tensors[i].sizes, sizeof tensors[i].sizes);
    all.push_back({desc, desc.dims, desc.dims, desc.dims});
  }
  return all;
}

/// A plugin for tensors of fixed sizes.
struct Call {
  std::unique_ptr<IPluginV3> plugin;
  IPluginV3OneRuntime* runtime = nullptr;
  int (*synchronize)() = nullptr;  // of a library whose kernels run on the CPU
  std::vector<PluginTensorDesc> inputs;
  std::vector<PluginTensorDesc> outputs;
  std::size_t workspace = 0;
};

}  // namespace

extern "C" {

/// nullptr, after a line on stderr, if it cannot be.
void* plugin_open(const char* library, const char* name, int field_count, const char* const* fields,
                  const std::int32_t* values, const Tensor* tensors, int input_count, int output_count) {
  static LogFinder finder;
  void* const loaded = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (loaded == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return nullptr;
  }
  reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(loaded, "setLoggerFinder"))(&finder);
  std::int32_t count = 0;
  auto* const creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(std::int32_t&)>(
      dlsym(loaded, "getCreators"))(count);
  std::vector<PluginField> given;
  for (int i = 0; i < field_count; ++i) given.emplace_back(fields[i], &values[i], PluginFieldType::kINT32, 1);
  const PluginFieldCollection collection{field_count, given.data()};
  for (int i = 0; i < count; ++i) {
    auto& creator = static_cast<IPluginCreatorV3One&>(*creators[i]);
    if (std::strcmp(creator.getPluginName(), name) != 0) continue;
    std::unique_ptr<IPluginV3> made(creator.createPlugin(name, &collection, TensorRTPhase::kRUNTIME));
    if (!made) return nullptr;
    auto call = std::make_unique<Call>();
    call->synchronize = reinterpret_cast<int (*)()>(dlsym(loaded, "cudaDeviceSynchronize"));
    const auto all = descriptions(tensors, input_count + output_count);
    auto* const build =
        static_cast<IPluginV3OneBuild*>(made->getCapabilityInterface(PluginCapabilityType::kBUILD));
    call->workspace =
        build->getWorkspaceSize(all.data(), input_count, all.data() + input_count, output_count);
    for (int t = 0; t < input_count; ++t) call->inputs.push_back(all[static_cast<std::size_t>(t)].desc);
    for (int t = 0; t < output_count; ++t) {
      call->outputs.push_back(all[static_cast<std::size_t>(input_count + t)].desc);
    }
    auto* const loader =
        static_cast<IPluginV3OneRuntime*>(made->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    call->plugin.reset(loader->attachToContext(nullptr));
    if (!call->plugin) return nullptr;
    call->runtime = static_cast<IPluginV3OneRuntime*>(
        call->plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    const int status =
        call->runtime->onShapeChange(call->inputs.data(), input_count, call->outputs.data(), output_count);
    return status == 0 ? call.release() : nullptr;
  }
  return nullptr;
}

std::size_t plugin_workspace(const void* call) { return static_cast<const Call*>(call)->workspace; }

int plugin_enqueue(void* call, const void* const* inputs, void* const* outputs, void* workspace,
                   void* stream) {
  auto& c = *static_cast<Call*>(call);
  const int status = c.runtime->enqueue(c.inputs.data(), c.outputs.data(), inputs, outputs, workspace,
                                        static_cast<cudaStream_t>(stream));
  return status == 0 && c.synchronize != nullptr ? c.synchronize() : status;
}

void plugin_close(void* call) { delete static_cast<Call*>(call); }

}  // extern "C"
