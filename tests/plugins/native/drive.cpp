// drive LIBRARY REQUEST host|device: drives one plugin as TensorRT would, through the real interfaces, and prints
// what it said and did as JSON.
//
// The request is JSON: "plugin", "fields" [{"name", "type", "values"}], "inputs" [{"type", "shape", "most", "file"}] with
// "dynamic": axes that the build does not know, "outputs": files to write, one for each output. What any plugin must do
// is checked here: fields that come back from serialisation, clones that are as good as the original, output shapes
// that follow from the inputs', a workspace and outputs that are not written past their ends, results that do not
// depend on what memory held before, and that are the same twice.
#include <dlfcn.h>

#include <functional>
#include <iostream>
#include <memory>

#include "driving.hpp"

using namespace driving;

namespace {

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
