#include "tokenizer/bpe.hpp"

#include <algorithm>
#include <cstring>

namespace qwenport::detail {
namespace {

/// A power of two, so large that a table of `count` entries stays at most two thirds full.
std::size_t table_size(std::size_t count) {
  std::size_t size = 16;
  while (size < count + count / 2) size *= 2;
  return size;
}

std::uint64_t mixed(std::uint64_t value) {
  value *= 0x9E3779B97F4A7C15;
  return value ^ value >> 32U;
}

std::size_t hash_of(std::uint32_t left, std::uint32_t right) {
  return static_cast<std::size_t>(mixed(std::uint64_t{left} << 32U | right));
}

std::size_t hash_of(std::string_view bytes) {
  std::uint64_t hash = bytes.size();
  while (bytes.size() >= sizeof hash) {
    std::uint64_t part = 0;
    std::memcpy(&part, bytes.data(), sizeof part);
    hash = mixed(hash ^ part);
    bytes.remove_prefix(sizeof part);
  }
  std::uint64_t part = 0;
  std::memcpy(&part, bytes.data(), bytes.size());
  return static_cast<std::size_t>(mixed(mixed(hash ^ part)));
}

constexpr auto later = [](const auto& a, const auto& b) { return a.order > b.order; };

}  // namespace

BytePairs::BytePairs(const TokenizerData& data) : data_(data) {
  merges_.resize(table_size(data.merges.size()));
  std::uint32_t rank = 0;
  for (const MergeRule& rule : data.merges) insert({rule.left, rule.right, rank++, rule.result});
  const auto has_word = [&](std::size_t id) {
    return (data.flags[id] & is_word) != 0 && !data.bytes(id).empty();
  };
  std::size_t count = 0;
  for (std::size_t id = 0; id < data.size(); ++id) count += has_word(id) ? 1 : 0;
  words_.assign(table_size(count), no_token);
  for (std::size_t id = 0; id < data.size(); ++id) {
    if (has_word(id)) insert_word(static_cast<std::uint32_t>(id));
  }
}

/// Of two merges of one pair, the later counts.
void BytePairs::insert(const Merge& merge) {
  const std::size_t mask = merges_.size() - 1;
  std::size_t at = hash_of(merge.left, merge.right) & mask;
  while (merges_[at].left != no_token &&
         (merges_[at].left != merge.left || merges_[at].right != merge.right)) {
    at = (at + 1) & mask;
  }
  merges_[at] = merge;
}

const BytePairs::Merge* BytePairs::find(std::uint32_t left, std::uint32_t right) const noexcept {
  const std::size_t mask = merges_.size() - 1;
  for (std::size_t at = hash_of(left, right) & mask; merges_[at].left != no_token; at = (at + 1) & mask) {
    if (merges_[at].left == left && merges_[at].right == right) return &merges_[at];
  }
  return nullptr;
}

void BytePairs::insert_word(std::uint32_t id) {
  const std::string_view word = data_.bytes(id);
  longest_word_ = std::max(longest_word_, word.size());
  const std::size_t mask = words_.size() - 1;
  std::size_t at = hash_of(word) & mask;
  while (words_[at] != no_token) at = (at + 1) & mask;
  words_[at] = id;
}

std::uint32_t BytePairs::find_word(std::string_view piece) const noexcept {
  if (piece.size() > longest_word_) return no_token;
  const std::size_t mask = words_.size() - 1;
  for (std::size_t at = hash_of(piece) & mask; words_[at] != no_token; at = (at + 1) & mask) {
    if (data_.bytes(words_[at]) == piece) return words_[at];
  }
  return no_token;
}

void BytePairs::add_candidate(std::uint32_t place, Scratch& scratch) const {
  const Scratch::Symbol& symbol = scratch.symbols[place];
  const Merge* merge = find(symbol.id, scratch.symbols[symbol.next].id);
  if (merge != nullptr) scratch.queue.push_back({std::uint64_t{merge->rank} << 32U | place, merge->result});
}

/// The order is that of `tokenizers`: by rank, then from left to right. As there, a candidate whose pair has changed counts
/// as long as the new pair has the same result.
void BytePairs::merge_all(Scratch& scratch) const {
  auto& symbols = scratch.symbols;
  auto& queue = scratch.queue;
  queue.clear();
  for (std::uint32_t place = 0; place + 1 < symbols.size(); ++place) add_candidate(place, scratch);
  std::make_heap(queue.begin(), queue.end(), later);
  const auto push_candidate = [&](std::uint32_t place) {
    const std::size_t before = queue.size();
    add_candidate(place, scratch);
    if (queue.size() != before) std::push_heap(queue.begin(), queue.end(), later);
  };
  while (!queue.empty()) {
    std::pop_heap(queue.begin(), queue.end(), later);
    const Scratch::Candidate best = queue.back();
    queue.pop_back();
    const auto place = static_cast<std::uint32_t>(best.order);
    Scratch::Symbol& left = symbols[place];
    if (left.id == no_token || left.next == no_token) continue;
    Scratch::Symbol& right = symbols[left.next];
    const Merge* merge = find(left.id, right.id);
    if (merge == nullptr || merge->result != best.result) continue;
    left.id = best.result;
    left.next = right.next;
    right.id = no_token;
    if (left.next != no_token) symbols[left.next].previous = place;
    if (left.previous != no_token) push_candidate(left.previous);
    if (left.next != no_token) push_candidate(place);
  }
}

void BytePairs::encode(std::string_view piece, Scratch& scratch, std::vector<Token>& tokens) const {
  if (const std::uint32_t id = find_word(piece); id != no_token) {
    tokens.push_back(id);
    return;
  }
  auto& symbols = scratch.symbols;
  symbols.clear();
  for (const char byte : piece) {
    const std::uint32_t id = data_.of_byte[static_cast<unsigned char>(byte)];
    if (id == no_token) continue;
    const auto place = static_cast<std::uint32_t>(symbols.size());
    symbols.push_back({id, place == 0 ? no_token : place - 1, place + 1});
  }
  if (symbols.empty()) return;
  symbols.back().next = no_token;
  merge_all(scratch);
  for (const Scratch::Symbol& symbol : symbols) {
    if (symbol.id != no_token) tokens.push_back(symbol.id);
  }
}

}  // namespace qwenport::detail
