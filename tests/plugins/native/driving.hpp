// What TensorRT hands to a plugin, without TensorRT: a log, fields, symbolic sizes, tensors in memory.
#pragma once

#include <NvInferRuntime.h>
#ifdef QWENPORT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <list>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace driving {

using nlohmann::json;
using namespace nvinfer1;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};
inline void expect(bool holds, const std::string& what) {
  if (!holds) throw Failure(what);
}

inline const std::vector<std::pair<std::string, DataType>> types = {
    {"fp32", DataType::kFLOAT},  {"fp16", DataType::kHALF},   {"bf16", DataType::kBF16},
    {"int64", DataType::kINT64}, {"int32", DataType::kINT32}, {"int8", DataType::kINT8}};
inline DataType type_of(const std::string& name) {
  for (const auto& [text, type] : types) {
    if (text == name) return type;
  }
  throw Failure("no type " + name);
}
inline std::string name_of(DataType wanted) {
  for (const auto& [text, type] : types) {
    if (type == wanted) return text;
  }
  return "another";
}
inline std::size_t bytes_of(DataType type) {
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
inline auto& build_of(IPluginV3& plugin) {
  return part_of<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}
inline auto& runtime_of(IPluginV3& plugin) {
  return part_of<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

inline Dims dims_of(const json& sizes) {
  Dims dims{};
  dims.nbDims = static_cast<int>(sizes.size());
  for (int d = 0; d < dims.nbDims; ++d) dims.d[d] = sizes[static_cast<std::size_t>(d)];
  return dims;
}
inline std::size_t count_of(const Dims& dims) {
  std::size_t count = 1;
  for (int d = 0; d < dims.nbDims; ++d) count *= static_cast<std::size_t>(dims.d[d]);
  return count;
}
inline json json_of(const Dims& dims) { return std::vector<std::int64_t>(dims.d, dims.d + dims.nbDims); }

inline std::vector<char> content_of(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  expect(stream.good(), "no file " + path);
  return {std::istreambuf_iterator<char>(stream), {}};
}

}  // namespace driving
