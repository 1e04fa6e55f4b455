// Makes a TensorRT plugin from an operator's specifics: IPluginV3 with its three capabilities, and its creator.
//
// An operator is a struct with its attributes and a few functions (see any plugins/<op>/plugin.cpp). TensorRT's
// requests are checked once, here or there, and what is impossible is logged in one line that names the plugin. No
// exception leaves a method; enqueue allocates nothing, waits for nothing and returns every launch error.
#pragma once

#include <NvInferRuntime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <new>
#include <string>
#include <vector>

#include "contract.hpp"

namespace qwenport::cuda {

using contract::plugin_namespace;
using contract::plugin_version;
constexpr int oldest_gpu =
    contract::oldest_plugin_gpu / 10;  // major compute capability: cp.async and bf16 tensor cores

/// Write one line to TensorRT's log: "<plugin>: <what>".
void complain(const char* plugin, const std::string& what) noexcept;

/// TensorRT's log; set when it loads the library.
void find_logger_with(nvinfer1::ILoggerFinder* finder) noexcept;

/// An int attribute, with the range of its values.
struct Attribute {
  const char* name;
  int least;
  int most;
};

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IExprBuilder;
using nvinfer1::PluginTensorDesc;

/// Read all of `attributes` from the fields. Empty, with the reason logged, unless each occurs once with a value in its
/// range and there are no other fields.
bool read_attributes(const char* plugin, const std::vector<Attribute>& attributes,
                     const nvinfer1::PluginFieldCollection* fields,
                     std::vector<std::int32_t>& values) noexcept;

/// Whether the local GPU can run the kernels; a machine without one can do everything else.
bool gpu_is_new_enough(const char* plugin) noexcept;

inline bool is_float(DataType type) {
  return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

/// The message of an operator's check that failed.
using Complaint = std::string;

/// Op has
///   static constexpr const char* name; static constexpr int inputs, outputs;
///   static std::vector<Attribute> attributes();           in the order of `values`
///   explicit Op(const std::vector<std::int32_t>& values);
///   static DataType output_type(int output, const DataType* inputs);
///   static bool supports(int tensor, const DataType* types)      inputs, then outputs; types up to `tensor` are set
///   Complaint check(const nvinfer1::Dims* inputs) const;         -1 is a size that is not known yet
///   void shapes(const DimsExprs* inputs, DimsExprs* outputs, IExprBuilder& build) const;
///   std::size_t workspace(const nvinfer1::Dims* inputs, DataType type) const;     of the largest shapes
///   cudaError_t enqueue(const PluginTensorDesc* in, const void* const* inputs, void* const* outputs, void* workspace,
///                       cudaStream_t stream) const;
template <typename Op>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit Plugin(std::vector<std::int32_t> values) : values_(std::move(values)), op_(values_) {}
  Plugin(const Plugin& other) : Plugin(other.values_) {}
  Plugin& operator=(const Plugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  nvinfer1::IPluginV3* clone() noexcept override {
    try {
      return new Plugin(*this);
    } catch (const std::exception& error) {
      complain(Op::name, error.what());
      return nullptr;
    }
  }

  [[nodiscard]] const char* getPluginName() const noexcept override { return Op::name; }
  [[nodiscard]] const char* getPluginVersion() const noexcept override { return plugin_version; }
  [[nodiscard]] const char* getPluginNamespace() const noexcept override { return plugin_namespace; }

  [[nodiscard]] int32_t getNbOutputs() const noexcept override { return Op::outputs; }
  int32_t getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType* inputs,
                             int32_t input_count) const noexcept override {
    if (!counts_are_right(input_count, output_count)) return -1;
    for (int i = 0; i < Op::outputs; ++i) outputs[i] = Op::output_type(i, inputs);
    return 0;
  }
  int32_t getOutputShapes(const DimsExprs* inputs, int32_t input_count, const DimsExprs* /*shape_inputs*/,
                          int32_t /*shape_input_count*/, DimsExprs* outputs, int32_t output_count,
                          IExprBuilder& build) noexcept override {
    if (!counts_are_right(input_count, output_count)) return -1;
    std::array<nvinfer1::Dims, Op::inputs> known{};
    for (int i = 0; i < Op::inputs; ++i) {
      known[i].nbDims = inputs[i].nbDims;
      for (int d = 0; d < inputs[i].nbDims; ++d) {
        known[i].d[d] = inputs[i].d[d]->isConstant() ? inputs[i].d[d]->getConstantValue() : -1;
      }
    }
    if (!is_right(known.data())) return -1;
    op_.shapes(inputs, outputs, build);
    return 0;
  }
  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override {
    if (!counts_are_right(input_count, output_count) || position < 0 ||
        position >= Op::inputs + Op::outputs) {
      return false;
    }
    std::array<DataType, Op::inputs + Op::outputs> types{};
    for (int i = 0; i <= position; ++i) types[i] = tensors[i].desc.type;
    return tensors[position].desc.format == nvinfer1::TensorFormat::kLINEAR &&
           Op::supports(position, types.data());
  }
  int32_t configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const DynamicPluginTensorDesc* /*outputs*/,
                          int32_t output_count) noexcept override {
    if (!counts_are_right(input_count, output_count)) return -1;
    // check fixed sizes only; sizes that are equal at run time may have different bounds
    std::array<nvinfer1::Dims, Op::inputs> known{};
    for (int i = 0; i < Op::inputs; ++i) known[i] = inputs[i].desc.dims;
    return is_right(known.data()) ? 0 : -1;
  }
  size_t getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t /*input_count*/,
                          const DynamicPluginTensorDesc* /*outputs*/,
                          int32_t /*output_count*/) const noexcept override {
    std::array<nvinfer1::Dims, Op::inputs> most{};
    for (int i = 0; i < Op::inputs; ++i) most[i] = inputs[i].max;
    return op_.workspace(most.data(), inputs[0].desc.type);
  }

  int32_t onShapeChange(const PluginTensorDesc* inputs, int32_t input_count,
                        const PluginTensorDesc* /*outputs*/, int32_t output_count) noexcept override {
    if (!counts_are_right(input_count, output_count)) return -1;
    std::array<nvinfer1::Dims, Op::inputs> sizes{};
    for (int i = 0; i < Op::inputs; ++i) sizes[i] = inputs[i].dims;
    return is_right(sizes.data()) ? 0 : -1;
  }
  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc* /*out*/, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    const cudaError_t status = op_.enqueue(in, inputs, outputs, workspace, stream);
    if (status != cudaSuccess) complain(Op::name, cudaGetErrorString(status));
    return static_cast<int32_t>(status);
  }
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* /*context*/) noexcept override {
    return gpu_is_new_enough(Op::name) ? clone() : nullptr;
  }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &serialised_; }

 private:
  static bool counts_are_right(int32_t inputs, int32_t outputs) noexcept {
    if (inputs == Op::inputs && outputs == Op::outputs) return true;
    complain(Op::name, "has " + std::to_string(Op::inputs) + " inputs and " + std::to_string(Op::outputs) +
                           " outputs, not " + std::to_string(inputs) + " and " + std::to_string(outputs));
    return false;
  }
  bool is_right(const nvinfer1::Dims* inputs) const noexcept {
    const Complaint complaint = op_.check(inputs);
    if (!complaint.empty()) complain(Op::name, complaint);
    return complaint.empty();
  }
  [[nodiscard]] std::vector<nvinfer1::PluginField> fields_of_values() const {
    std::vector<nvinfer1::PluginField> fields;
    const std::vector<Attribute> attributes = Op::attributes();
    for (std::size_t i = 0; i < attributes.size(); ++i) {
      fields.emplace_back(attributes[i].name, &values_[i], nvinfer1::PluginFieldType::kINT32, 1);
    }
    return fields;
  }

  std::vector<std::int32_t> values_;
  Op op_;
  std::vector<nvinfer1::PluginField> fields_ = fields_of_values();
  nvinfer1::PluginFieldCollection serialised_{static_cast<int32_t>(fields_.size()), fields_.data()};
};

template <typename Op>
class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  nvinfer1::IPluginV3* createPlugin(const char* /*name*/, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase /*phase*/) noexcept override {
    try {
      std::vector<std::int32_t> values;
      if (!read_attributes(Op::name, Op::attributes(), fields, values)) return nullptr;
      return new Plugin<Op>(std::move(values));
    } catch (const std::exception& error) {
      complain(Op::name, error.what());
      return nullptr;
    }
  }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &names_; }
  [[nodiscard]] const char* getPluginName() const noexcept override { return Op::name; }
  [[nodiscard]] const char* getPluginVersion() const noexcept override { return plugin_version; }
  [[nodiscard]] const char* getPluginNamespace() const noexcept override { return plugin_namespace; }

 private:
  static std::vector<nvinfer1::PluginField> field_names() {
    std::vector<nvinfer1::PluginField> names;
    for (const Attribute& attribute : Op::attributes()) {
      names.emplace_back(attribute.name, nullptr, nvinfer1::PluginFieldType::kINT32, 1);
    }
    return names;
  }

  std::vector<nvinfer1::PluginField> fields_ = field_names();
  nvinfer1::PluginFieldCollection names_{static_cast<int32_t>(fields_.size()), fields_.data()};
};

/// Call work with a null pointer to the C++ type of a floating-point DataType.
template <typename Work>
auto with_type(DataType type, const Work& work) {
  if (type == DataType::kHALF) return work(static_cast<__half*>(nullptr));
  if (type == DataType::kBF16) return work(static_cast<__nv_bfloat16*>(nullptr));
  return work(static_cast<float*>(nullptr));
}

/// Product of the sizes from `begin` to `end`; -1 if one of them is not known yet.
inline std::int64_t product(const nvinfer1::Dims& dims, int begin, int end) {
  std::int64_t sizes = 1;
  for (int d = begin; d < end; ++d) {
    if (dims.d[d] < 0) return -1;
    sizes *= dims.d[d];
  }
  return sizes;
}

/// Whether two sizes may be equal: they are, or one is not known yet.
inline bool agree(std::int64_t a, std::int64_t b) { return a < 0 || b < 0 || a == b; }

inline std::string text(const nvinfer1::Dims& dims) {
  std::string sizes = "[";
  for (int d = 0; d < dims.nbDims; ++d) sizes += (d != 0 ? ", " : "") + std::to_string(dims.d[d]);
  return sizes + "]";
}

template <typename Op>
nvinfer1::IPluginCreatorInterface* creator() {
  static Creator<Op> instance;
  return &instance;
}

/// Define one in a plugin's source file: the library's plugins are those of all registrations.
class Registration {
 public:
  explicit Registration(nvinfer1::IPluginCreatorInterface* (*creator)()) noexcept : creator_(creator) {
    first_ = this;
  }
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;

  /// The creators of all registrations, in no particular order.
  static std::vector<nvinfer1::IPluginCreatorInterface*> creators();

 private:
  static inline const Registration* first_ = nullptr;
  nvinfer1::IPluginCreatorInterface* (*creator_)();
  const Registration* next_ = first_;
};

}  // namespace qwenport::cuda
