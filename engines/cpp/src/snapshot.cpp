// SessionCore::save and restore. A snapshot is
//   "QWENPORT" version:u64 engine's identity:64 bytes rows:u64
//   (length:i64 tokens:i64[length] request lengths:i64[length], if the engine scales by length)[rows]
//   the slots in use of every cache, row and head     checksum:u64 of all before it
#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "session.hpp"

namespace qwenport::detail {
namespace {

constexpr std::size_t word = sizeof(std::uint64_t);
constexpr std::uint64_t snapshot_version = 1;
constexpr char magic[] = "QWENPORT";

/// Detects damage, not forgery: every word changes all later states.
std::uint64_t checksum(const std::byte* data, std::size_t bytes) {
  std::uint64_t state = bytes;
  while (bytes != 0) {
    std::uint64_t next = 0;
    const std::size_t taken = std::min(bytes, word);
    std::memcpy(&next, data, taken);
    state = (state ^ next) * 0x9E3779B97F4A7C15;
    state ^= state >> 32U;
    data += taken;
    bytes -= taken;
  }
  return state;
}

template <typename T>
void put(std::vector<std::byte>& out, const T* values, std::size_t count) {
  const auto* bytes = reinterpret_cast<const std::byte*>(values);
  out.insert(out.end(), bytes, bytes + count * sizeof(T));
}

[[noreturn]] void refuse(const std::string& why) { throw Error(ErrorCode::bad_snapshot, "snapshot: " + why); }

struct Header {
  char magic[8];
  std::uint64_t version;
  char engine[64];
  std::uint64_t rows;
};

}  // namespace

/// Call visit(device address, bytes) for the used slots of every cache, row and head.
template <typename Visit>
void SessionCore::for_each_used_slice(const Rows& rows, const Visit& visit) {
  const std::size_t head_bytes = static_cast<std::size_t>(slots_) * manifest().slot_bytes();
  for (const Memory& cache : caches_) {
    auto* head = static_cast<std::byte*>(cache.get());
    for (const std::vector<Token>& row : rows) {
      for (int h = 0; h < manifest().kv_heads; ++h, head += head_bytes) {
        if (!row.empty()) visit(head, row.size() * manifest().slot_bytes());
      }
    }
  }
}

/// Bytes of the largest slice; at least 1.
std::size_t SessionCore::longest_slice(const Rows& rows) const {
  std::size_t longest = 0;
  for (const std::vector<Token>& row : rows) longest = std::max(longest, row.size());
  return std::max<std::size_t>(longest * manifest().slot_bytes(), 1);
}

std::vector<std::byte> SessionCore::save() {
  check_usable();
  Header header{};
  std::memcpy(header.magic, magic, sizeof header.magic);
  header.version = snapshot_version;
  std::memcpy(header.engine, manifest().identity.data(), sizeof header.engine);
  header.rows = held_.size();
  std::vector<std::byte> out;
  put(out, &header, 1);
  for (std::size_t b = 0; b < held_.size(); ++b) {
    const auto length = static_cast<std::int64_t>(held_[b].size());
    put(out, &length, 1);
    put(out, held_[b].data(), held_[b].size());
    if (scale_) put(out, scale_->held()[b].data(), held_[b].size());
  }
  const Memory bounce = device_->is_host() ? Memory{} : pinned_memory(longest_slice(held_));
  for_each_used_slice(held_, [&](const std::byte* device, std::size_t bytes) {
    if (bounce) {
      device_->copy_to_host(bounce.get(), device, bytes);
      device_->synchronize();
      device = static_cast<const std::byte*>(bounce.get());
    }
    put(out, device, bytes);
  });
  const std::uint64_t sum = checksum(out.data(), out.size());
  put(out, &sum, 1);
  return out;
}

void SessionCore::restore(const std::vector<std::byte>& snapshot) {
  check_usable();
  Header header{};
  if (snapshot.size() < sizeof header + word) refuse("too short to be one");
  std::memcpy(&header, snapshot.data(), sizeof header);
  if (std::memcmp(header.magic, magic, sizeof header.magic) != 0) refuse("not a snapshot");
  if (header.version != snapshot_version) refuse("of another version of this library");
  std::uint64_t sum = 0;
  std::memcpy(&sum, snapshot.data() + snapshot.size() - word, word);
  if (sum != checksum(snapshot.data(), snapshot.size() - word)) refuse("damaged");
  if (std::memcmp(header.engine, manifest().identity.data(), sizeof header.engine) != 0) {
    refuse("of another engine");
  }
  if (header.rows != held_.size()) {
    refuse("of " + std::to_string(header.rows) + " rows, this session has " + std::to_string(held_.size()));
  }
  const std::byte* next = snapshot.data() + sizeof header;
  std::size_t left = snapshot.size() - word - sizeof header;
  const auto take = [&](void* to, std::size_t bytes) {
    if (left < bytes) refuse("damaged");
    std::memcpy(to, next, bytes);
    next += bytes;
    left -= bytes;
  };
  Rows rows(held_.size());
  Rows requests(rows.size());  // one for each token, if the engine scales by length
  for (std::size_t b = 0; b < rows.size(); ++b) {
    std::int64_t length = 0;
    take(&length, sizeof length);
    if (length < 0 || length > manifest().info.capacity) refuse("damaged");
    if (length > capacity_) {
      throw Error(ErrorCode::capacity, "snapshot: row " + std::to_string(b) + " holds " +
                                           std::to_string(length) + " tokens; there are " +
                                           std::to_string(capacity_) + " slots");
    }
    rows[b].reserve(static_cast<std::size_t>(capacity_));
    rows[b].resize(static_cast<std::size_t>(length));
    take(rows[b].data(), rows[b].size() * sizeof(Token));
    for (const Token token : rows[b]) {
      if (token < 0 || token >= manifest().info.vocab_size) refuse("damaged");
    }
    if (!scale_) continue;
    requests[b].reserve(static_cast<std::size_t>(capacity_));
    requests[b].resize(rows[b].size());
    take(requests[b].data(), requests[b].size() * sizeof(std::int64_t));
    for (const std::int64_t request : requests[b]) {
      if (!scale_->is_possible(request, manifest().info.capacity)) refuse("damaged");
    }
  }
  std::size_t needed = 0;
  for_each_used_slice(rows, [&needed](const std::byte*, std::size_t bytes) { needed += bytes; });
  if (needed != left) refuse("damaged");

  const Memory bounce = device_->is_host() ? Memory{} : pinned_memory(longest_slice(rows));
  failed_ = true;  // until all of it is restored
  for_each_used_slice(rows, [&](std::byte* device, std::size_t bytes) {
    take(bounce ? bounce.get() : device, bytes);
    if (!bounce) return;
    device_->copy_to_device(device, bounce.get(), bytes);
    device_->synchronize();
  });
  failed_ = false;
  held_ = std::move(rows);
  if (scale_) scale_->restore(std::move(requests));
}

}  // namespace qwenport::detail
