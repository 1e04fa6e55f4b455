// onnxruntime_steps ENGINE LIBRARY STEPS: decode with a library that computes nothing (stand_in_onnxruntime.cpp), and print
// what the runtime adds to a step: nanoseconds, allocations, and the tensors bound in all steps together.
#include <dlfcn.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <string>

#include "qwenport/qwenport.hpp"

namespace {
long allocations = 0;
}  // namespace

void* operator new(std::size_t bytes) {
  ++allocations;
  if (void* const memory = std::malloc(bytes != 0 ? bytes : 1)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t /*bytes*/) noexcept { std::free(memory); }

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  try {
    const int steps = std::stoi(argv[3]);
    qwenport::EngineOptions options;
    options.onnxruntime = argv[2];
    const auto engine = qwenport::Engine::load(argv[1], options);
    qwenport::Session session(engine);
    void* const library = dlopen("libonnxruntime.so.1", RTLD_NOW | RTLD_NOLOAD);
    const auto* binds = static_cast<const long*>(dlsym(library, "stand_in_binds"));
    session.prefill({1, 2, 3});
    session.decode(4);  // the shapes of the steps below, up to the next multiple of 64
    const long bound = *binds;
    const long allocated = allocations;
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < steps; ++i) {
      session.decode(5);
      if (session.lengths()[0] == 60) session.truncate(4);
    }
    const auto spent = std::chrono::steady_clock::now() - start;
    const auto counted = static_cast<double>(allocations - allocated) / steps - 1;  // lengths() makes one
    std::printf("%f %f %ld\n", std::chrono::duration<double, std::nano>(spent).count() / steps, counted,
                *binds - bound);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
