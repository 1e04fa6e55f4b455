// drive LIBRARY REQUEST host|device: drives one plugin as TensorRT would, through the real interfaces, and prints
// what it said and did as JSON.
//
// The request is JSON: "plugin", "fields" [{"name", "type", "values"}], "inputs" [{"type", "shape", "most", "file"}] with
// "dynamic": axes that the build does not know, "outputs": files to write, one for each output. What any plugin must do
// is checked here: fields that come back from serialisation, clones that are as good as the original, output shapes
// that follow from the inputs', a workspace and outputs that are not written past their ends, results that do not
// depend on what memory held before, and that are the same twice.
#include <NvInferRuntime.h>
#include <dlfcn.h>
#ifdef QWENPORT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <list>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

using nlohmann::json;
using namespace nvinfer1;

namespace {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};
void expect(bool holds, const std::string& what) {
  if (!holds) throw Failure(what);
}

const std::vector<std::pair<std::string, DataType>> types = {
    {"fp32", DataType::kFLOAT},  {"fp16", DataType::kHALF},   {"bf16", DataType::kBF16},
    {"int64", DataType::kINT64}, {"int32", DataType::kINT32}, {"int8", DataType::kINT8}};
DataType type_of(const std::string& name) {
  for (const auto& [text, type] : types) {
    if (text == name) return type;
  }
  throw Failure("no type " + name);
}
std::string name_of(DataType wanted) {
  for (const auto& [text, type] : types) {
    if (type == wanted) return text;
  }
  return "another";
}
std::size_t bytes_of(DataType type) {
  switch (type) {
    case DataType::kINT64:
      return 8;
    case DataType::kFLOAT:
    case DataType::kINT32:
      return 4;
    case DataType::kINT8:
      return 1;
    default:
      return 2;
  }
}

/// Keeps what a plugin says.
class Log final : public ILogger {
 public:
  void log(Severity severity, const char* text) noexcept override {
    if (severity <= Severity::kERROR) lines.emplace_back(text);
  }
  std::vector<std::string> lines;
};
class LogFinder final : public ILoggerFinder {
 public:
  explicit LogFinder(Log& log) : log_(log) {}
  ILogger* findLogger() override { return &log_; }

 private:
  Log& log_;
};

// Symbolic sizes. The public classes forward to an implementation, which is these classes' other base.

class Size final : public IDimensionExpr, public apiv::VDimensionExpr {
 public:
  Size(std::int64_t value, bool known) : value(value), known(known) { mImpl = this; }
  bool isConstant() const noexcept override { return known; }
  std::int64_t getConstantValue() const noexcept override { return known ? value : -1; }
  bool isSizeTensor() const noexcept override { return false; }
  apiv::VDimensionExpr* getImpl() const noexcept { return mImpl; }
  std::int64_t value;
  bool known;
};

class Sizes final : public IExprBuilder, public apiv::VExprBuilder {
 public:
  Sizes() { mImpl = this; }
  const IDimensionExpr* make(std::int64_t value, bool known) { return &all_.emplace_back(value, known); }
  const IDimensionExpr* constant(std::int64_t value) noexcept override { return make(value, true); }
  const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& a,
                                  const IDimensionExpr& b) noexcept override {
    const auto& x = static_cast<const Size&>(a);
    const auto& y = static_cast<const Size&>(b);
    const bool known = x.known && y.known;
    switch (op) {
      case DimensionOperation::kSUM:
        return make(x.value + y.value, known);
      case DimensionOperation::kPROD:
        return make(x.value * y.value, known);
      case DimensionOperation::kFLOOR_DIV:
        return make(x.value / y.value, known);
      default:
        return nullptr;
    }
  }
  const IDimensionExpr* declareSizeTensor(std::int32_t, const IDimensionExpr&,
                                          const IDimensionExpr&) override {
    return nullptr;
  }

 private:
  std::list<Size> all_;
};

/// Memory on the host, of exactly its size for the address sanitizer, or on the GPU, with a guard after its end.
class Buffer {
 public:
  Buffer(std::size_t bytes, bool on_device, int fill) : bytes_(bytes), on_device_(on_device) {
    if (!on_device) {
      memory_ = std::malloc(std::max<std::size_t>(bytes, 1));
      expect(memory_ != nullptr, "no memory");
      std::memset(memory_, fill, bytes);
      return;
    }
#ifdef QWENPORT_WITH_CUDA
    std::vector<unsigned char> content(bytes + guard, static_cast<unsigned char>(fill));
    std::fill(content.end() - guard, content.end(), guard_byte);
    expect(cudaMalloc(&memory_, bytes + guard) == cudaSuccess, "no device memory");
    copy(memory_, content.data(), content.size());
#else
    throw Failure("built without CUDA");
#endif
  }
  ~Buffer() {
    if (!on_device_) std::free(memory_);
#ifdef QWENPORT_WITH_CUDA
    if (on_device_) cudaFree(memory_);
#endif
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  [[nodiscard]] void* get() const { return memory_; }
  void write(const std::vector<char>& content) {
    expect(content.size() == bytes_, "a file of another size than its tensor");
    copy(memory_, content.data(), bytes_);
  }
  [[nodiscard]] std::vector<char> read() const {
    std::vector<char> content(bytes_ + (on_device_ ? guard : 0));
    copy(content.data(), memory_, content.size());
    for (std::size_t i = bytes_; i < content.size(); ++i) {
      expect(static_cast<unsigned char>(content[i]) == guard_byte, "written past the end");
    }
    content.resize(bytes_);
    return content;
  }

 private:
  static constexpr std::ptrdiff_t guard = 4096;
  static constexpr unsigned char guard_byte = 0xA5;
  void copy(void* to, const void* from, std::size_t bytes) const {
    if (!on_device_) {
      if (bytes != 0) std::memcpy(to, from, bytes);
      return;
    }
#ifdef QWENPORT_WITH_CUDA
    expect(cudaMemcpy(to, from, bytes, cudaMemcpyDefault) == cudaSuccess, "a copy failed");
#endif
  }
  std::size_t bytes_;
  bool on_device_;
  void* memory_ = nullptr;
};

/// Fields that own their content.
class Fields {
 public:
  explicit Fields(const json& list) {
    for (const json& field : list) {
      const std::string type = field.at("type");
      std::vector<char> data;
      const auto put = [&data](const auto& value) {
        const char* begin = reinterpret_cast<const char*>(&value);
        data.insert(data.end(), begin, begin + sizeof value);
      };
      for (const json& value : field.at("values")) {
        if (type == "int32") put(value.get<std::int32_t>());
        if (type == "int64") put(value.get<std::int64_t>());
        if (type == "fp32") put(value.get<float>());
      }
      const auto tag = type == "int32"   ? PluginFieldType::kINT32
                       : type == "int64" ? PluginFieldType::kINT64
                                         : PluginFieldType::kFLOAT32;
      add(field.at("name"), data, tag, static_cast<int>(field.at("values").size()));
    }
  }
  explicit Fields(const PluginFieldCollection& from) {
    for (int i = 0; i < from.nbFields; ++i) {
      const PluginField& field = from.fields[i];
      const auto* data = static_cast<const char*>(field.data);
      expect(field.type == PluginFieldType::kINT32,
             "a serialised field of another type than its attribute's");
      add(field.name, {data, data + 4 * field.length}, field.type, field.length);
    }
  }
  const PluginFieldCollection* get() {
    fields_.clear();
    for (const One& one : all_) {
      fields_.emplace_back(one.name.c_str(), one.data.empty() ? nullptr : one.data.data(), one.type,
                           one.length);
    }
    collection_ = {static_cast<int>(fields_.size()), fields_.data()};
    return &collection_;
  }
  bool operator==(const Fields& other) const {
    return std::equal(
        all_.begin(), all_.end(), other.all_.begin(), other.all_.end(), [](const One& a, const One& b) {
          return a.name == b.name && a.data == b.data && a.type == b.type && a.length == b.length;
        });
  }

 private:
  struct One {
    std::string name;
    std::vector<char> data;
    PluginFieldType type;
    int length;
  };
  void add(const std::string& name, std::vector<char> data, PluginFieldType type, int length) {
    all_.push_back({name, std::move(data), type, length});
  }
  std::list<One> all_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

template <typename Part>
Part& part_of(IPluginV3& plugin, PluginCapabilityType type) {
  auto* const part = static_cast<Part*>(plugin.getCapabilityInterface(type));
  expect(part != nullptr, "a capability is missing");
  return *part;
}
auto& build_of(IPluginV3& plugin) { return part_of<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD); }
auto& runtime_of(IPluginV3& plugin) {
  return part_of<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

Dims dims_of(const json& sizes) {
  Dims dims{};
  dims.nbDims = static_cast<int>(sizes.size());
  for (int d = 0; d < dims.nbDims; ++d) dims.d[d] = sizes[static_cast<std::size_t>(d)];
  return dims;
}
std::size_t count_of(const Dims& dims) {
  std::size_t count = 1;
  for (int d = 0; d < dims.nbDims; ++d) count *= static_cast<std::size_t>(dims.d[d]);
  return count;
}
json json_of(const Dims& dims) { return std::vector<std::int64_t>(dims.d, dims.d + dims.nbDims); }

std::vector<char> content_of(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  expect(stream.good(), "no file " + path);
  return {std::istreambuf_iterator<char>(stream), {}};
}

/// How far a plugin comes, and what is found on the way.
class Drive {
 public:
  Drive(const json& request, bool on_device, IPluginCreatorV3One& creator, void* library)
      : request_(request),
        on_device_(on_device),
        creator_(creator),
        synchronize_(reinterpret_cast<int (*)()>(dlsym(library, "cudaDeviceSynchronize"))) {}

  json run() {
    Fields fields(request_.at("fields"));
    std::unique_ptr<IPluginV3> plugin(creator_.createPlugin("test", fields.get(), TensorRTPhase::kBUILD));
    if (!plugin) return stopped("create");
    auto& core = part_of<IPluginV3OneCore>(*plugin, PluginCapabilityType::kCORE);
    expect(std::string(core.getPluginName()) == creator_.getPluginName(), "the plugin has another name");
    expect(std::string(core.getPluginVersion()) == creator_.getPluginVersion(),
           "the plugin has another version");
    expect(std::string(core.getPluginNamespace()) == creator_.getPluginNamespace(), "another namespace");
    if (!describe(build_of(*plugin))) return stopped("shapes");
    formats(build_of(*plugin));
    std::vector<DynamicPluginTensorDesc> tensors = dynamic_tensors();
    const auto inputs = static_cast<int>(in_.size());
    const auto outputs = static_cast<int>(out_.size());
    if (build_of(*plugin).configurePlugin(tensors.data(), inputs, tensors.data() + inputs, outputs) != 0) {
      return stopped("configure");
    }
    workspace_ = build_of(*plugin).getWorkspaceSize(tensors.data(), inputs, tensors.data() + inputs, outputs);
    report_["workspace"] = workspace_;

    Fields saved(*runtime_of(*plugin).getFieldsToSerialize());
    std::unique_ptr<IPluginV3> copy(plugin->clone());
    expect(copy != nullptr, "no clone");
    plugin.reset();
    expect(saved == Fields(*runtime_of(*copy).getFieldsToSerialize()), "a clone has other fields");
    copy.reset();
    std::unique_ptr<IPluginV3> loaded(creator_.createPlugin("test", saved.get(), TensorRTPhase::kRUNTIME));
    expect(loaded != nullptr, "what was serialised makes no plugin");
    expect(saved == Fields(*runtime_of(*loaded).getFieldsToSerialize()), "serialised again, fields differ");
    std::unique_ptr<IPluginV3> attached(runtime_of(*loaded).attachToContext(nullptr));
    if (!attached) return stopped("attach");
    loaded.reset();
    if (runtime_of(*attached).onShapeChange(in_.data(), inputs, out_.data(), outputs) != 0)
      return stopped("sizes");
    if (!request_.contains("outputs")) return stopped("no enqueue was asked for");
    return enqueue(runtime_of(*attached));
  }

 private:
  json stopped(const std::string& where) {
    report_["stopped"] = where;
    return report_;
  }

  /// Types and shapes of the outputs, with the sizes that the build does not know as symbols.
  bool describe(IPluginV3OneBuild& build) {
    const json& given = request_.at("inputs");
    std::vector<DataType> input_types;
    std::vector<DimsExprs> shapes;
    Sizes sizes;
    for (const json& input : given) {
      PluginTensorDesc desc{};
      desc.dims = dims_of(input.at("shape"));
      desc.type = type_of(input.at("type"));
      desc.format = TensorFormat::kLINEAR;
      in_.push_back(desc);
      input_types.push_back(desc.type);
      DimsExprs shape{};
      shape.nbDims = desc.dims.nbDims;
      const json dynamic = input.value("dynamic", json::array());
      for (int d = 0; d < shape.nbDims; ++d) {
        const bool known = std::find(dynamic.begin(), dynamic.end(), d) == dynamic.end();
        shape.d[d] = sizes.make(desc.dims.d[d], known);
      }
      shapes.push_back(shape);
    }
    const int outputs = build.getNbOutputs();
    const auto inputs = static_cast<int>(in_.size());
    std::vector<DataType> output_types(static_cast<std::size_t>(outputs));
    std::vector<DimsExprs> output_shapes(static_cast<std::size_t>(outputs));
    if (build.getOutputDataTypes(output_types.data(), outputs, input_types.data(), inputs) != 0) return false;
    if (build.getOutputShapes(shapes.data(), inputs, nullptr, 0, output_shapes.data(), outputs, sizes) != 0)
      return false;
    for (int i = 0; i < outputs; ++i) {
      const auto at = static_cast<std::size_t>(i);
      PluginTensorDesc desc{};
      desc.type = output_types[at];
      desc.format = TensorFormat::kLINEAR;
      desc.dims.nbDims = output_shapes[at].nbDims;
      for (int d = 0; d < desc.dims.nbDims; ++d)
        desc.dims.d[d] = static_cast<const Size*>(output_shapes[at].d[d])->value;
      out_.push_back(desc);
      report_["outputs"].push_back({{"type", name_of(desc.type)}, {"shape", json_of(desc.dims)}});
    }
    return true;
  }

  /// Which combinations of types the plugin takes, asked as TensorRT asks: tensor by tensor, those before it settled.
  void formats(IPluginV3OneBuild& build) {
    const auto inputs = static_cast<int>(in_.size());
    const auto outputs = static_cast<int>(out_.size());
    std::vector<DynamicPluginTensorDesc> tensors(in_.size() + out_.size());
    json accepted = json::array();
    const std::function<void(int)> settle = [&](int position) {
      if (position == inputs + outputs) {
        json names;
        for (const auto& tensor : tensors) names.push_back(name_of(tensor.desc.type));
        accepted.push_back(names);
        return;
      }
      auto& desc = tensors[static_cast<std::size_t>(position)].desc;
      for (const auto& [name, type] : types) {
        desc.type = type;
        desc.format = TensorFormat::kHWC8;
        expect(!build.supportsFormatCombination(position, tensors.data(), inputs, outputs),
               "a format it does not have");
        desc.format = TensorFormat::kLINEAR;
        if (build.supportsFormatCombination(position, tensors.data(), inputs, outputs)) settle(position + 1);
      }
    };
    settle(0);
    report_["formats"] = accepted;
  }

  std::vector<DynamicPluginTensorDesc> dynamic_tensors() {
    std::vector<DynamicPluginTensorDesc> tensors;
    for (std::size_t i = 0; i < in_.size(); ++i) {
      DynamicPluginTensorDesc tensor{in_[i], in_[i].dims, in_[i].dims, in_[i].dims};
      const json& input = request_.at("inputs")[i];
      if (input.contains("most")) tensor.max = dims_of(input.at("most"));
      for (const json& axis : input.value("dynamic", json::array())) {
        tensor.min.d[axis.get<int>()] = 1;
        tensor.desc.dims.d[axis.get<int>()] = -1;
      }
      tensors.push_back(tensor);
    }
    for (const auto& desc : out_) tensors.push_back({desc, desc.dims, desc.dims, desc.dims});
    return tensors;
  }

  json enqueue(IPluginV3OneRuntime& plugin) {
    std::vector<std::unique_ptr<Buffer>> inputs;
    std::vector<const void*> from;
    for (std::size_t i = 0; i < in_.size(); ++i) {
      inputs.push_back(
          std::make_unique<Buffer>(count_of(in_[i].dims) * bytes_of(in_[i].type), on_device_, 0));
      inputs.back()->write(content_of(request_.at("inputs")[i].at("file")));
      from.push_back(inputs.back()->get());
    }
    std::vector<std::vector<char>> first;
    for (const int fill : {0xFF, 0x7B}) {
      std::vector<std::unique_ptr<Buffer>> outputs;
      std::vector<void*> to;
      for (const auto& desc : out_) {
        outputs.push_back(
            std::make_unique<Buffer>(count_of(desc.dims) * bytes_of(desc.type), on_device_, fill));
        to.push_back(outputs.back()->get());
      }
      const Buffer workspace(workspace_, on_device_, fill);
      const int status =
          plugin.enqueue(in_.data(), out_.data(), from.data(), to.data(), workspace.get(), nullptr);
      if (status != 0) return stopped("enqueue");
#ifdef QWENPORT_WITH_CUDA
      if (on_device_) expect(cudaDeviceSynchronize() == cudaSuccess, "the kernels failed");
#endif
      if (!on_device_ && synchronize_ != nullptr) expect(synchronize_() == 0, "the kernels failed");
      (void)workspace.read();
      std::vector<std::vector<char>> results;
      for (const auto& output : outputs) results.push_back(output->read());
      if (!first.empty()) expect(first == results, "run twice, the results differ");
      first = std::move(results);
    }
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      expect(inputs[i]->read() == content_of(request_.at("inputs")[i].at("file")), "an input was written");
    }
    for (std::size_t i = 0; i < first.size(); ++i) {
      std::ofstream stream(request_.at("outputs")[i].get<std::string>(), std::ios::binary);
      stream.write(first[i].data(), static_cast<std::streamsize>(first[i].size()));
    }
    report_["finished"] = true;
    return report_;
  }

  const json& request_;
  bool on_device_;
  IPluginCreatorV3One& creator_;
  int (*synchronize_)();  // of a library whose kernels run on the CPU
  std::vector<PluginTensorDesc> in_;
  std::vector<PluginTensorDesc> out_;
  std::size_t workspace_ = 0;
  json report_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: drive LIBRARY REQUEST host|device\n";
    return 2;
  }
  try {
    void* const library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    expect(library != nullptr, std::string("no library: ") + (library == nullptr ? dlerror() : ""));
    auto* const set_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    auto* const get_creators =
        reinterpret_cast<IPluginCreatorInterface* const* (*)(std::int32_t&)>(dlsym(library, "getCreators"));
    expect(set_finder != nullptr && get_creators != nullptr, "not a plugin library");
    Log log;
    LogFinder finder(log);
    set_finder(&finder);
    const json request = json::parse(content_of(argv[2]));
    std::int32_t count = 0;
    IPluginCreatorInterface* const* const creators = get_creators(count);
    json report;
    for (int i = 0; i < count; ++i) {
      expect(std::string(creators[i]->getInterfaceInfo().kind) == "PLUGIN CREATOR_V3ONE",
             "not a creator of IPluginV3");
      auto& creator = static_cast<IPluginCreatorV3One&>(*creators[i]);
      report["plugins"].push_back(creator.getPluginName());
      if (request.at("plugin") != creator.getPluginName()) continue;
      report["version"] = creator.getPluginVersion();
      report["namespace"] = creator.getPluginNamespace();
      for (int f = 0; f < creator.getFieldNames()->nbFields; ++f) {
        report["attributes"].push_back(creator.getFieldNames()->fields[f].name);
      }
      report.update(Drive(request, std::string(argv[3]) == "device", creator, library).run());
    }
    report["log"] = log.lines;
    std::cout << report.dump() << '\n';
    set_finder(nullptr);
  } catch (const std::exception& error) {
    std::cerr << "drive: " << error.what() << '\n';
    return 1;
  }
}
