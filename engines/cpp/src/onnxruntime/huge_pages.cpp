#include "huge_pages.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>

namespace qwenport::detail {
namespace {

constexpr std::uintptr_t huge = 2U << 20U;  // where pages have 4 KiB
constexpr std::uintptr_t small = 4096;
constexpr int collapse = 25;  // MADV_COLLAPSE of Linux 6.1: copy pages into huge ones, now

bool are_allowed() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string setting;
  return std::getline(file, setting) && setting.find("[never]") == std::string::npos &&
         sysconf(_SC_PAGESIZE) == static_cast<long>(small);
}

/// The process's private, writable memory that belongs to no file, in order.
std::vector<AddressRange> anonymous_memory() {
  std::vector<AddressRange> found;
  std::ifstream file("/proc/self/maps");
  for (std::string line; std::getline(file, line);) {
    std::uintptr_t start = 0;
    std::uintptr_t end = 0;
    std::uint64_t inode = 0;
    std::string rights;
    std::string offset;
    std::string device;
    std::istringstream fields(line);
    fields >> std::hex >> start;
    fields.ignore();  // a dash
    if ((fields >> end >> rights >> offset >> device >> std::dec >> inode) && inode == 0 &&
        rights == "rw-p") {
      found.emplace_back(start, end);
    }
  }
  return found;
}

/// Whether every page of a huge page has been written to.
bool is_resident(const unsigned char* pages) {
  return std::all_of(pages, pages + huge / small, [](unsigned char page) { return (page & 1U) != 0; });
}

void move(AddressRange range) {
  const std::uintptr_t start = (range.first + huge - 1) / huge * huge;
  const std::uintptr_t end = range.second / huge * huge;
  if (start >= end) return;
  std::vector<unsigned char> pages((end - start) / small);
  // NOLINTNEXTLINE(performance-no-int-to-ptr): an address that the system has told
  if (mincore(reinterpret_cast<void*>(start), end - start, pages.data()) != 0) return;
  for (std::uintptr_t low = start; low < end; low += huge) {
    std::uintptr_t high = low;
    while (high < end && is_resident(&pages[(high - start) / small])) high += huge;
    if (high == low) continue;
    // NOLINTNEXTLINE(performance-no-int-to-ptr)
    madvise(reinterpret_cast<void*>(low), high - low, collapse);
    low = high - huge;
  }
}

}  // namespace

std::vector<AddressRange> without(const std::vector<AddressRange>& ranges,
                                  const std::vector<AddressRange>& others) {
  std::vector<AddressRange> left;
  for (auto [start, end] : ranges) {
    for (const auto& [low, high] : others) {
      if (low >= end || high <= start) continue;
      if (start < low) left.emplace_back(start, low);
      start = high;
    }
    if (start < end) left.emplace_back(start, end);
  }
  return left;
}

HugePages::HugePages() : are_allowed_(are_allowed()) {
  if (are_allowed_) before_ = anonymous_memory();
}

void HugePages::move_new_memory() const {
  if (!are_allowed_) return;
  for (const AddressRange& range : without(anonymous_memory(), before_)) move(range);
}

}  // namespace qwenport::detail
