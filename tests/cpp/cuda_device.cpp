// src/tensorrt/cuda.cpp on a GPU, or with cuda_on_cpu.cpp in CUDA's place. Without a GPU the exit code is 2.
#define DOCTEST_CONFIG_IMPLEMENT
#include "cuda_device.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "tensorrt/cuda.hpp"

using namespace qwenport;
using namespace qwenport::detail;

namespace {

constexpr int COUNT = 100'000;
constexpr std::size_t BYTES = COUNT * sizeof(float);

/// A device with one array, and page-locked memory to look at it.
struct Array {
  explicit Array(const Gpu& gpu)
      : device(gpu),
        data(static_cast<float*>(device.allocate(BYTES))),
        host(static_cast<float*>(device.allocate_pinned(BYTES))) {}
  ~Array() {
    device.release(data);
    device.release_pinned(host);
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  void add(float value) const { check_cuda(::add(data, COUNT, value, device.stream()), "add"); }
  /// Whether every element has the value.
  bool holds(float value) {
    device.copy_to_host(host, data, BYTES);
    device.synchronize();
    for (int i = 0; i < COUNT; ++i) {
      if (host[i] != value) return false;
    }
    return true;
  }
  /// Whether the stream takes work, and captures it.
  bool works() {
    device.copy_to_host(host, data, BYTES);
    device.synchronize();
    const float value = host[0];
    add(1);
    const auto graph = device.capture([&] { add(2); });
    graph->launch();
    return holds(value + 3) && cudaPeekAtLastError() == cudaSuccess;
  }

  CudaDevice device;
  float* data;
  float* host;
};

ErrorCode code_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const Error& error) {
    return error.code();
  }
  return ErrorCode::internal;
}

}  // namespace

TEST_CASE("the architecture of a GPU has a name, and a number too large is refused") {
  CHECK(gpu_architecture(0, "sm90").rfind("sm", 0) == 0);
  int count = 0;
  REQUIRE(cudaGetDeviceCount(&count) == cudaSuccess);
  CHECK(code_of([&] { (void)gpu_architecture(count, "sm90"); }) == ErrorCode::wrong_gpu);
}

TEST_CASE("a GPU and its driver have names that stay") {
  const std::string uuid = gpu_uuid(0);
  CHECK(uuid.rfind("GPU-", 0) == 0);
  CHECK(uuid.size() == std::string("GPU-01234567-0123-0123-0123-0123456789ab").size());
  CHECK(uuid == gpu_uuid(0));
  CHECK(!driver_version().empty());
  CHECK(driver_version() == driver_version());
}

TEST_CASE("memory is zeroed although others wrote to it, and aligned") {
  const Gpu gpu(0);
  for (int turn = 0; turn < 4; ++turn) {
    Array array(gpu);
    CHECK(reinterpret_cast<std::uintptr_t>(array.data) % 256 == 0);
    CHECK(array.holds(0));
    array.add(7);
    CHECK(array.holds(7));
  }
  CudaDevice device(gpu);
  CHECK(device.allocate(0) == nullptr);
}

TEST_CASE("memory that the GPU does not have is refused, and the device goes on") {
  const Gpu gpu(0);
  Array array(gpu);
  CHECK(code_of([&] { array.device.allocate(std::size_t{1} << 46U); }) == ErrorCode::device);
  CHECK(array.works());
}

TEST_CASE("captured work does not run, and runs at each replay") {
  const Gpu gpu(0);
  Array array(gpu);
  const auto graph = array.device.capture([&] { array.add(1); });
  CHECK(array.holds(0));
  for (int turn = 1; turn <= 3; ++turn) {
    graph->launch();
    CHECK(array.holds(static_cast<float>(turn)));
  }
}

TEST_CASE("a replay reads what page-locked memory holds then") {
  const Gpu gpu(0);
  Array array(gpu);
  auto* const input = static_cast<float*>(array.device.allocate_pinned(BYTES));
  const auto graph = array.device.capture([&] {
    array.device.copy_to_device(array.data, input, BYTES);
    array.add(1);
    array.device.copy_to_host(array.host, array.data, BYTES);
  });
  for (int turn = 0; turn < 3; ++turn) {
    for (int i = 0; i < COUNT; ++i) input[i] = static_cast<float>(turn * 10 + i % 7);
    graph->launch();
    array.device.synchronize();
    bool same = true;
    for (int i = 0; i < COUNT; ++i) same = same && array.host[i] == input[i] + 1;
    CHECK(same);
  }
  array.device.release_pinned(input);
}

TEST_CASE("a capture that throws passes the exception on and leaves the stream as it was") {
  const Gpu gpu(0);
  Array array(gpu);
  for (const bool after_work : {false, true}) {
    CHECK_THROWS_AS(array.device.capture([&] {
      if (after_work) array.add(1);
      throw std::out_of_range("no such step");
    }),
                    std::out_of_range);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusActive;
    CHECK(cudaStreamIsCapturing(array.device.stream(), &status) == cudaSuccess);
    CHECK(status == cudaStreamCaptureStatusNone);
    CHECK(array.holds(0));
  }
  CHECK(array.works());
}

TEST_CASE("what may not be captured is an error, and the device goes on") {
  const Gpu gpu(0);
  Array array(gpu);
  const auto refused = [&](const std::function<void()>& work) {
    return code_of([&] { (void)array.device.capture(work); });
  };
  CHECK(refused([&] { array.device.synchronize(); }) == ErrorCode::device);
  CHECK(array.works());
  CHECK(refused([&] { array.device.allocate(1U << 20U); }) == ErrorCode::device);
  CHECK(array.works());
  // an error that the work does not see ends the capture all the same
  CHECK(refused([&] { (void)cudaStreamSynchronize(array.device.stream()); }) == ErrorCode::device);
  CHECK(array.works());
}

TEST_CASE("two threads use a GPU at once, each with its own stream, one of them capturing") {
  const Gpu gpu(0);
  std::atomic<bool> done{false};
  std::atomic<int> wrong{0};
  std::thread other([&] {
    while (!done) {  // what a capture in another mode would forbid
      Array array(gpu);
      array.add(3);
      if (!array.holds(3)) ++wrong;
    }
  });
  try {
    Array array(gpu);
    for (int turn = 0; turn < 200; ++turn) {
      const auto graph = array.device.capture([&] { array.add(1); });
      graph->launch();
      if (!array.holds(static_cast<float>(turn + 1))) ++wrong;
    }
  } catch (const std::exception& error) {
    MESSAGE(error.what());
    ++wrong;
  }
  done = true;
  other.join();
  CHECK(wrong == 0);
}

TEST_CASE("a thread without a context has none afterwards") {
  const Gpu gpu(0);
  void* found = nullptr;
  check_cuda(cudaGetDriverEntryPointByVersion("cuCtxGetCurrent", &found, 12000, cudaEnableDefault),
             "cuCtxGetCurrent");
  const auto current_context = reinterpret_cast<PFN_cuCtxGetCurrent_v4000>(found);
  CUcontext before = nullptr;
  CUcontext after = nullptr;
  bool worked = false;
  std::thread([&] {
    current_context(&before);
    {
      Array array(gpu);
      const CurrentGpu current(gpu);  // for the kernel, which no method of the device launches
      worked = array.works();
    }
    current_context(&after);
  }).join();
  CHECK(worked);
  CHECK(before == nullptr);
  CHECK(after == nullptr);
}

int main(int argc, char** argv) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::puts("no GPU: stopped before the first launch");
    return 2;
  }
  return doctest::Context(argc, argv).run();
}
