#include "cuda.hpp"

#include <dlfcn.h>

#include <cstdio>

namespace qwenport::detail {
namespace {

class CudaGraph final : public Graph {
 public:
  CudaGraph(const CudaDevice& device, cudaGraph_t recorded) : device_(device) {
    const cudaError_t status = cudaGraphInstantiate(&graph_, recorded, 0);
    cudaGraphDestroy(recorded);
    check_cuda(status, "cudaGraphInstantiate");
  }
  ~CudaGraph() override {
    const CurrentGpu current(device_.gpu());
    cudaGraphExecDestroy(graph_);
  }
  CudaGraph(const CudaGraph&) = delete;
  CudaGraph& operator=(const CudaGraph&) = delete;

  void launch() override {
    const CurrentGpu current(device_.gpu());
    check_cuda(cudaGraphLaunch(graph_, device_.stream()), "cudaGraphLaunch");
  }

 private:
  const CudaDevice& device_;
  cudaGraphExec_t graph_ = nullptr;
};

/// A function of the driver, as CUDA 12.0 has it.
template <typename Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  check_cuda(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault), name);
  if (found == nullptr) throw Error(ErrorCode::device, std::string("the driver has no ") + name);
  return reinterpret_cast<Function>(found);
}

}  // namespace

void check_cuda(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // reported here; the next call starts clean
  throw Error(ErrorCode::device, std::string(call) + ": " + cudaGetErrorString(status));
}

std::string gpu_architecture(int gpu, const std::string& needed) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorInsufficientDriver) {
    throw Error(ErrorCode::missing_library, "an engine needs an NVIDIA GPU (" + needed +
                                                ") and its driver, and there is no driver here "
                                                "that CUDA " +
                                                std::to_string(CUDART_VERSION / 1000) + " works with");
  }
  if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0)) {
    throw Error(ErrorCode::wrong_gpu,
                "an engine needs an NVIDIA GPU (" + needed + ") and there is none here");
  }
  check_cuda(status, "cudaGetDeviceCount");
  if (gpu < 0 || gpu >= count) {
    throw Error(ErrorCode::wrong_gpu,
                "no GPU " + std::to_string(gpu) + "; there are " + std::to_string(count) + ", from 0");
  }
  int major = 0;
  int minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, gpu),
             "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, gpu),
             "cudaDeviceGetAttribute");
  return "sm" + std::to_string(major) + std::to_string(minor);
}

std::string gpu_uuid(int gpu) {
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, gpu), "cudaGetDeviceProperties");
  std::string text = "GPU";
  for (std::size_t i = 0; i < sizeof properties.uuid.bytes; ++i) {
    char digits[4];
    const bool begins_group = i == 0 || i == 4 || i == 6 || i == 8 || i == 10;
    std::snprintf(digits, sizeof digits, "%s%02x", begins_group ? "-" : "",
                  static_cast<unsigned char>(properties.uuid.bytes[i]));
    text += digits;
  }
  return text;
}

std::string driver_version() {
  if (void* const nvml = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL)) {
    const auto init = reinterpret_cast<int (*)()>(dlsym(nvml, "nvmlInit_v2"));
    const auto version =
        reinterpret_cast<int (*)(char*, unsigned)>(dlsym(nvml, "nvmlSystemGetDriverVersion"));
    const auto shutdown = reinterpret_cast<int (*)()>(dlsym(nvml, "nvmlShutdown"));
    char text[80] = "";
    if (init != nullptr && version != nullptr && shutdown != nullptr && init() == 0) {
      if (version(text, sizeof text) != 0) text[0] = 0;
      shutdown();
    }
    dlclose(nvml);
    if (text[0] != 0) return text;
  }
  int version = 0;
  check_cuda(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return "cuda " + std::to_string(version);
}

Gpu::Gpu(int number)
    : number_(number),
      push_(driver_function<PFN_cuCtxPushCurrent_v4000>("cuCtxPushCurrent")),
      pop_(driver_function<PFN_cuCtxPopCurrent_v4000>("cuCtxPopCurrent")) {
  CUdevice device = 0;
  const auto check = [](CUresult status, const char* call) {
    if (status != CUDA_SUCCESS) {
      throw Error(ErrorCode::device, std::string(call) + " failed with CUDA error " + std::to_string(status));
    }
  };
  check(driver_function<PFN_cuInit_v2000>("cuInit")(0), "cuInit");
  check(driver_function<PFN_cuDeviceGet_v2000>("cuDeviceGet")(&device, number), "cuDeviceGet");
  check(driver_function<PFN_cuDevicePrimaryCtxRetain_v7000>("cuDevicePrimaryCtxRetain")(&context_, device),
        "cuDevicePrimaryCtxRetain");
}

CudaDevice::CudaDevice(const Gpu& gpu) : gpu_(gpu) {
  const CurrentGpu current(gpu_);
  check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
}

CudaDevice::~CudaDevice() {
  const CurrentGpu current(gpu_);
  cudaStreamDestroy(stream_);
}

void* CudaDevice::allocate(std::size_t bytes) {
  if (bytes == 0) return nullptr;
  const CurrentGpu current(gpu_);
  void* memory = nullptr;
  cudaError_t status = cudaMalloc(&memory, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw Error(ErrorCode::device, "GPU " + std::to_string(gpu_.number()) + " has no " +
                                       std::to_string(bytes) +
                                       " bytes left; give the session fewer rows, or build with a smaller "
                                       "--max-seq-len");
  }
  check_cuda(status, "cudaMalloc");
  status = cudaMemsetAsync(memory, 0, bytes, stream_);
  if (status != cudaSuccess) release(memory);
  check_cuda(status, "cudaMemsetAsync");
  return memory;
}

void CudaDevice::release(void* memory) noexcept {
  const CurrentGpu current(gpu_);
  cudaFree(memory);
}

void* CudaDevice::allocate_pinned(std::size_t bytes) {
  const CurrentGpu current(gpu_);
  void* memory = nullptr;
  check_cuda(cudaHostAlloc(&memory, bytes, cudaHostAllocDefault), "cudaHostAlloc");
  return memory;
}

void CudaDevice::release_pinned(void* memory) noexcept {
  const CurrentGpu current(gpu_);
  cudaFreeHost(memory);
}

void CudaDevice::copy_to_device(void* device, const void* pinned, std::size_t bytes) {
  const CurrentGpu current(gpu_);
  check_cuda(cudaMemcpyAsync(device, pinned, bytes, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync");
}

void CudaDevice::copy_to_host(void* pinned, const void* device, std::size_t bytes) {
  const CurrentGpu current(gpu_);
  check_cuda(cudaMemcpyAsync(pinned, device, bytes, cudaMemcpyDeviceToHost, stream_), "cudaMemcpyAsync");
}

void CudaDevice::synchronize() {
  const CurrentGpu current(gpu_);
  check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
}

std::unique_ptr<Graph> CudaDevice::capture(const std::function<void()>& work) {
  const CurrentGpu current(gpu_);
  // thread-local: other threads may use CUDA freely meanwhile
  check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  cudaGraph_t recorded = nullptr;
  try {
    work();
  } catch (...) {
    if (cudaStreamEndCapture(stream_, &recorded) == cudaSuccess) cudaGraphDestroy(recorded);
    cudaGetLastError();  // an invalidated capture ends with its own error
    throw;
  }
  check_cuda(cudaStreamEndCapture(stream_, &recorded), "cudaStreamEndCapture");
  return std::make_unique<CudaGraph>(*this, recorded);
}

}  // namespace qwenport::detail
