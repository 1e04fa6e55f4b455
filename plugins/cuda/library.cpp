// The functions that TensorRT's plugin registry looks for in the library, and code shared by all plugins.
#include <atomic>
#include <cstdio>

#include "plugin.hpp"

namespace qwenport::cuda {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

nvinfer1::ILogger* find_logger() noexcept {
  nvinfer1::ILoggerFinder* const finder = logger_finder;
  return finder != nullptr ? finder->findLogger() : nullptr;
}

std::string quoted(const char* name) {
  return "attribute '" + std::string(name != nullptr ? name : "") + "'";
}

/// Empty if the field is valid for the attribute.
Complaint check_field(const Attribute& attribute, const nvinfer1::PluginField& field) {
  if (field.type != nvinfer1::PluginFieldType::kINT32 || field.length != 1 || field.data == nullptr) {
    return quoted(attribute.name) + " is not one int32";
  }
  const std::int32_t value = *static_cast<const std::int32_t*>(field.data);
  if (value >= attribute.least && value <= attribute.most) return {};
  return quoted(attribute.name) + " is " + std::to_string(value) + ", outside " +
         std::to_string(attribute.least) + ".." + std::to_string(attribute.most);
}

}  // namespace

void complain(const char* plugin, const std::string& what) noexcept {
  nvinfer1::ILogger* const logger = find_logger();
  try {
    const std::string line = std::string(plugin) + ": " + what;
    if (logger != nullptr) {
      logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
    } else {
      std::fprintf(stderr, "%s\n", line.c_str());
    }
  } catch (...) {  // out of memory for the message
    if (logger != nullptr) logger->log(nvinfer1::ILogger::Severity::kERROR, plugin);
  }
}

void find_logger_with(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder = finder; }

bool read_attributes(const char* plugin, const std::vector<Attribute>& attributes,
                     const nvinfer1::PluginFieldCollection* fields,
                     std::vector<std::int32_t>& values) noexcept {
  try {
    values.assign(attributes.size(), 0);
    std::vector<int> seen(attributes.size());
    Complaint complaint;
    const int count = fields != nullptr ? fields->nbFields : 0;
    for (int i = 0; i < count && complaint.empty(); ++i) {
      const nvinfer1::PluginField& field = fields->fields[i];
      std::size_t which = 0;
      while (which < attributes.size() &&
             (field.name == nullptr || std::string(field.name) != attributes[which].name)) {
        ++which;
      }
      if (which == attributes.size()) {
        complaint = quoted(field.name) + " is unknown";
      } else if (++seen[which] > 1) {
        complaint = quoted(field.name) + " is given twice";
      } else {
        complaint = check_field(attributes[which], field);
        if (complaint.empty()) values[which] = *static_cast<const std::int32_t*>(field.data);
      }
    }
    for (std::size_t i = 0; i < attributes.size() && complaint.empty(); ++i) {
      if (seen[i] == 0) complaint = quoted(attributes[i].name) + " is missing";
    }
    if (!complaint.empty()) complain(plugin, complaint);
    return complaint.empty();
  } catch (const std::exception& error) {
    complain(plugin, error.what());
    return false;
  }
}

bool gpu_is_new_enough(const char* plugin) noexcept {
  int gpu = 0;
  int major = 0;
  int minor = 0;
  const bool found = cudaGetDevice(&gpu) == cudaSuccess &&
                     cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, gpu) == cudaSuccess &&
                     cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, gpu) == cudaSuccess;
  if (!found) cudaGetLastError();
  if (!found || major >= oldest_gpu) return true;
  complain(plugin, "needs a GPU of compute capability " + std::to_string(oldest_gpu) +
                       ".0 or newer, this one has " + std::to_string(major) + "." + std::to_string(minor));
  return false;
}

std::vector<nvinfer1::IPluginCreatorInterface*> Registration::creators() {
  std::vector<nvinfer1::IPluginCreatorInterface*> all;
  for (const Registration* each = first_; each != nullptr; each = each->next_) {
    all.push_back(each->creator_());
  }
  return all;
}

}  // namespace qwenport::cuda

static_assert(NV_TENSORRT_MAJOR == 10, "the plugins are for TensorRT 10");

#define QWENPORT_STRING_OF(number) #number
#define QWENPORT_STRING(number) QWENPORT_STRING_OF(number)
#define QWENPORT_VISIBLE extern "C" __attribute__((visibility("default")))

/// TensorRT calls this when it loads the library.
QWENPORT_VISIBLE void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  qwenport::cuda::find_logger_with(finder);
}

/// TensorRT calls this too.
QWENPORT_VISIBLE nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static const auto creators = qwenport::cuda::Registration::creators();
  count = static_cast<int32_t>(creators.size());
  return creators.data();
}

/// Our own: "version;GPUs;release of TensorRT's headers", to recognise a library.
QWENPORT_VISIBLE const char* qwenport_plugins_description() {
  static const std::string text = std::string(qwenport::cuda::plugin_version) +
                                  ";" QWENPORT_ARCHITECTURES ";" +
                                  QWENPORT_STRING(NV_TENSORRT_MAJOR) "." QWENPORT_STRING(NV_TENSORRT_MINOR);
  return text.c_str();
}
