// The functions of CUDA that src/tensorrt uses, on the CPU: work is done when it is issued, or recorded while its stream
// captures. Memory that is allocated again holds what it held, and what may not be captured ends the capture. It is
// linked in CUDA's place, so that cuda_device.cpp runs without a GPU; it proves our code, not CUDA's.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cuda_device.hpp"

using Work = std::vector<std::function<void()>>;

struct CUstream_st {
  bool capturing = false;
  bool invalid = false;
  Work recorded;
};
struct CUgraph_st {
  Work work;
};
struct CUgraphExec_st {
  Work work;
};

namespace {

constexpr std::size_t ALIGNMENT = 256;
constexpr std::size_t MEMORY = std::size_t{1} << 40U;

thread_local cudaError_t last_error = cudaSuccess;
thread_local std::vector<CUcontext> contexts;
thread_local CUstream_st* captured = nullptr;  // by this thread
std::mutex mutex;
std::multimap<std::size_t, std::unique_ptr<void, decltype(&std::free)>> released;  // by their size
std::map<void*, std::size_t> sizes;

cudaError_t failed(cudaError_t error) { return last_error = error; }

cudaError_t issue(cudaStream_t stream, std::function<void()> work) {
  if (!stream->capturing) {
    work();
  } else if (stream->invalid) {
    return failed(cudaErrorStreamCaptureInvalidated);
  } else {
    stream->recorded.push_back(std::move(work));
  }
  return cudaSuccess;
}

/// Whether this thread captures; that ends with an error then.
bool forbidden() {
  if (captured == nullptr) return false;
  captured->invalid = true;
  return true;
}

CUresult push(CUcontext context) {
  contexts.push_back(context);
  return CUDA_SUCCESS;
}
CUresult pop(CUcontext* context) {
  *context = contexts.back();
  contexts.pop_back();
  return CUDA_SUCCESS;
}
CUresult current(CUcontext* context) {
  *context = contexts.empty() ? nullptr : contexts.back();
  return CUDA_SUCCESS;
}
CUresult initialize(unsigned /*flags*/) { return CUDA_SUCCESS; }
CUresult device_of(CUdevice* device, int number) {
  *device = number;
  return CUDA_SUCCESS;
}
CUresult retain(CUcontext* context, CUdevice /*device*/) {
  static int primary;
  *context = reinterpret_cast<CUcontext>(&primary);
  return CUDA_SUCCESS;
}

}  // namespace

cudaError_t add(float* data, int count, float value, cudaStream_t stream) {
  return issue(stream, [=] {
    for (int i = 0; i < count; ++i) data[i] += value;
  });
}

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int /*device*/) {
  *properties = {};
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t /*error*/) { return "an error"; }
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** funcPtr, unsigned /*version*/,
                                             unsigned long long /*flags*/,
                                             cudaDriverEntryPointQueryResult* /*status*/) {
  static const std::map<std::string, void*> functions = {
      {"cuCtxPushCurrent", reinterpret_cast<void*>(push)},
      {"cuCtxPopCurrent", reinterpret_cast<void*>(pop)},
      {"cuCtxGetCurrent", reinterpret_cast<void*>(current)},
      {"cuInit", reinterpret_cast<void*>(initialize)},
      {"cuDeviceGet", reinterpret_cast<void*>(device_of)},
      {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(retain)}};
  *funcPtr = functions.at(symbol);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned /*flags*/) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (!stream->capturing) return cudaSuccess;
  stream->invalid = true;
  return failed(cudaErrorStreamCaptureUnsupported);
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode /*mode*/) {
  *stream = {true, false, {}};
  captured = stream;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  captured = nullptr;
  stream->capturing = false;
  *graph = stream->invalid ? nullptr : new CUgraph_st{stream->recorded};
  return stream->invalid ? failed(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** devPtr, std::size_t size) {
  if (forbidden()) return failed(cudaErrorStreamCaptureUnsupported);
  if (size > MEMORY) return failed(cudaErrorMemoryAllocation);
  const std::scoped_lock lock(mutex);
  const auto again = released.find(size);
  if (again != released.end()) {
    *devPtr = again->second.release();
    released.erase(again);
  } else {
    *devPtr = std::aligned_alloc(ALIGNMENT, (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    std::memset(*devPtr, 0x7B, size);
    sizes[*devPtr] = size;
  }
  return cudaSuccess;
}
cudaError_t cudaFree(void* devPtr) {
  const std::scoped_lock lock(mutex);
  if (devPtr != nullptr)
    released.emplace(sizes.at(devPtr), std::unique_ptr<void, decltype(&std::free)>(devPtr, &std::free));
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** pHost, std::size_t size, unsigned /*flags*/) {
  if (forbidden()) return failed(cudaErrorStreamCaptureUnsupported);
  *pHost = std::malloc(size);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* ptr) {
  std::free(ptr);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* devPtr, int value, std::size_t count, cudaStream_t stream) {
  return issue(stream, [=] { std::memset(devPtr, value, count); });
}
cudaError_t cudaMemcpyAsync(void* dst, const void* src, std::size_t count, cudaMemcpyKind /*kind*/,
                            cudaStream_t stream) {
  return issue(stream, [=] { std::memcpy(dst, src, count); });
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* pGraphExec, cudaGraph_t graph,
                                 unsigned long long /*flags*/) {
  *pGraphExec = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t /*stream*/) {
  for (const auto& work : graph->work) work();
  return cudaSuccess;
}
}
