// Device over the CUDA runtime: one GPU, one stream. CUDA is linked statically and finds the driver at run
// time, so a machine without one gets an error message.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include "backend.hpp"

namespace qwenport::detail {

/// \throws Error device: names the call that failed and CUDA's reason.
void check_cuda(cudaError_t status, const char* call);

/// The architecture of a GPU, "sm90".
/// \param needed the architectures that an engine was built for, for the message.
/// \throws Error missing_library (no driver), wrong_gpu (no such GPU).
std::string gpu_architecture(int gpu, const std::string& needed);

/// A GPU as `nvidia-smi -L` names it: "GPU-" and its UUID. \throws Error device.
std::string gpu_uuid(int gpu);

/// The driver's version, "570.86.15"; without NVML "cuda " and what CUDA says. \throws Error device.
std::string driver_version();

/// A GPU by its number and its primary context, the one that the CUDA runtime uses. The context
/// stays until the process ends, as for any user of the CUDA runtime.
class Gpu {
 public:
  /// \throws Error device.
  explicit Gpu(int number);
  [[nodiscard]] int number() const noexcept { return number_; }

 private:
  friend class CurrentGpu;
  int number_;
  CUcontext context_ = nullptr;
  PFN_cuCtxPushCurrent_v4000 push_ = nullptr;
  PFN_cuCtxPopCurrent_v4000 pop_ = nullptr;
};

/// Makes a GPU current for the calling thread, and finally restores what was current before, which may be
/// nothing (cudaSetDevice would have to create a context on GPU 0 to return to).
class CurrentGpu {
 public:
  explicit CurrentGpu(const Gpu& gpu) noexcept
      : gpu_(gpu), pushed_(gpu.push_(gpu.context_) == CUDA_SUCCESS) {}
  ~CurrentGpu() {
    CUcontext popped = nullptr;
    if (pushed_) gpu_.pop_(&popped);
  }
  CurrentGpu(const CurrentGpu&) = delete;
  CurrentGpu& operator=(const CurrentGpu&) = delete;

 private:
  const Gpu& gpu_;
  bool pushed_;
};

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(const Gpu& gpu);
  ~CudaDevice() override;
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  [[nodiscard]] const Gpu& gpu() const noexcept { return gpu_; }
  [[nodiscard]] cudaStream_t stream() const noexcept { return stream_; }

  void* allocate(std::size_t bytes) override;
  void release(void* memory) noexcept override;
  void* allocate_pinned(std::size_t bytes) override;
  void release_pinned(void* memory) noexcept override;
  void copy_to_device(void* device, const void* pinned, std::size_t bytes) override;
  void copy_to_host(void* pinned, const void* device, std::size_t bytes) override;
  void synchronize() override;
  std::unique_ptr<Graph> capture(const std::function<void()>& work) override;

 private:
  Gpu gpu_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace qwenport::detail
