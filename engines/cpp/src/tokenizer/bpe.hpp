// Byte-pair encoding of one piece of a text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "qwenport/qwenport.hpp"
#include "tokenizer/data.hpp"

namespace qwenport::detail {

class BytePairs {
 public:
  /// \param data must outlive this object.
  explicit BytePairs(const TokenizerData& data);

  /// Memory that one call after the other uses.
  class Scratch {
    friend class BytePairs;
    struct Symbol {
      std::uint32_t id;
      std::uint32_t previous;
      std::uint32_t next;
    };
    struct Candidate {
      std::uint64_t order;  // rank, then place
      std::uint32_t result;
    };
    std::vector<Symbol> symbols;
    std::vector<Candidate> queue;
  };
  /// Append the tokens of a piece. Takes n log n steps for n bytes. \param piece smaller than 4 GB.
  void encode(std::string_view piece, Scratch& scratch, std::vector<Token>& tokens) const;

 private:
  struct Merge {
    std::uint32_t left = no_token;
    std::uint32_t right = 0;
    std::uint32_t rank = 0;
    std::uint32_t result = 0;
  };
  void insert(const Merge& merge);
  [[nodiscard]] const Merge* find(std::uint32_t left, std::uint32_t right) const noexcept;
  [[nodiscard]] std::uint32_t find_word(std::string_view piece) const noexcept;
  void insert_word(std::uint32_t id);
  void add_candidate(std::uint32_t place, Scratch& scratch) const;
  void merge_all(Scratch& scratch) const;

  const TokenizerData& data_;
  // Hash tables with open addressing, of a size that is a power of two.
  std::vector<Merge> merges_;
  std::vector<std::uint32_t> words_;
  std::size_t longest_word_ = 0;
};

}  // namespace qwenport::detail
