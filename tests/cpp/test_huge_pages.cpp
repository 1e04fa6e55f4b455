// Memory that is allocated after a HugePages, and written to, is moved into huge pages.
#include <doctest/doctest.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstring>
#include <fstream>
#include <random>
#include <set>
#include <string>

#include "onnxruntime/huge_pages.hpp"

namespace {

using qwenport::detail::AddressRange;
using qwenport::detail::HugePages;

constexpr std::size_t huge = 2U << 20U;
constexpr std::size_t size = 8 * huge;

/// A line of what the kernel says of the process, in bytes.
std::size_t rollup(const std::string& key) {
  std::ifstream file("/proc/self/smaps_rollup");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind(key + ":", 0) == 0) return std::stoul(line.substr(key.size() + 1)) << 10U;
  }
  return 0;
}

class Memory {
 public:
  explicit Memory(std::size_t written)
      : data_(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    REQUIRE(data_ != MAP_FAILED);
    std::memset(data_, 1, written);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { munmap(data_, size); }
  [[nodiscard]] int sum() const {
    int sum = 0;
    for (std::size_t i = 0; i < size; i += huge / 2) sum += static_cast<const char*>(data_)[i];
    return sum;
  }

 private:
  void* data_;
};

bool are_allowed() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string setting;
  return std::getline(file, setting) && setting.find("[never]") == std::string::npos;
}

std::set<std::uintptr_t> points(const std::vector<AddressRange>& ranges) {
  std::set<std::uintptr_t> found;
  for (const auto& [start, end] : ranges) {
    for (std::uintptr_t point = start; point < end; ++point) found.insert(point);
  }
  return found;
}

TEST_CASE("new memory is moved into huge pages, what was not written costs nothing, and older memory stays") {
  const Memory old(size);
  const std::size_t before = rollup("AnonHugePages");
  const HugePages huge_pages;
  const Memory made(size / 2);
  const std::size_t resident = rollup("Rss");
  huge_pages.move_new_memory();
  const std::size_t grown = rollup("AnonHugePages") - before;
  CHECK(rollup("Rss") < resident + huge);
  CHECK(grown <= 5 * huge);
  CHECK(grown >= (are_allowed() ? 2 * huge : 0));
  CHECK(old.sum() == 16);
  CHECK(made.sum() == 8);
}

TEST_CASE("what is left of ranges is the difference of sets") {
  std::mt19937 random(1);
  for (int turn = 0; turn < 500; ++turn) {
    std::vector<AddressRange> ranges[2];
    for (auto& some : ranges) {
      std::uintptr_t at = random() % 4;
      for (unsigned i = random() % 5; i > 0; --i) {
        const std::uintptr_t end = at + 1 + random() % 6;
        some.emplace_back(at, end);
        at = end + random() % 4;
      }
    }
    const auto left = qwenport::detail::without(ranges[0], ranges[1]);
    auto expected = points(ranges[0]);
    for (const std::uintptr_t point : points(ranges[1])) expected.erase(point);
    CHECK(points(left) == expected);
    for (const auto& [start, end] : left) CHECK(start < end);
  }
}

}  // namespace
