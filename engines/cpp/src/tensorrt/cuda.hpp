// Device over the CUDA runtime: one GPU, one stream. CUDA is linked statically and finds the driver at run
// time, so a machine without one gets an error message.
#pragma once

#include <cuda_runtime_api.h>

#include "backend.hpp"

namespace qwenport::detail {

/// \throws Error device: names the call that failed and CUDA's reason.
void check_cuda(cudaError_t status, const char* call);

/// The architecture of a GPU, "sm90".
/// \param needed what an engine was built for, for the message.
/// \throws Error missing_library (no driver), wrong_gpu (no such GPU).
std::string gpu_architecture(int gpu, const std::string& needed);

/// Makes a GPU the calling thread's current one, and the former one again at its end.
class CurrentGpu {
 public:
  explicit CurrentGpu(int gpu);
  ~CurrentGpu();
  CurrentGpu(const CurrentGpu&) = delete;
  CurrentGpu& operator=(const CurrentGpu&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int gpu);
  ~CudaDevice() override;
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  [[nodiscard]] int gpu() const noexcept { return gpu_; }
  [[nodiscard]] cudaStream_t stream() const noexcept { return stream_; }

  void* allocate(std::size_t bytes) override;
  void release(void* memory) noexcept override;
  void* allocate_pinned(std::size_t bytes) override;
  void release_pinned(void* memory) noexcept override;
  void copy_to_device(void* device, const void* pinned, std::size_t bytes) override;
  void copy_to_host(void* pinned, const void* device, std::size_t bytes) override;
  void synchronize() override;
  void begin_capture() override;
  std::unique_ptr<Graph> end_capture() override;

 private:
  int gpu_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace qwenport::detail
