// A tokenizer in memory: what Tokenizer and StreamDecoder share.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "manifest.hpp"
#include "qwenport/tokenizer.hpp"
#include "tokenizer/added_tokens.hpp"
#include "tokenizer/bpe.hpp"
#include "tokenizer/data.hpp"

namespace qwenport::detail {

class TokenizerCore {
 public:
  /// \param file the bytes of a tokenizer file. \param where its path. \throws Error bad_engine.
  TokenizerCore(std::string_view file, const std::string& where)
      : data_(file, where), raw_(data_, false), normalized_(data_, true), pairs_(data_) {}
  ~TokenizerCore() = default;
  TokenizerCore(const TokenizerCore&) = delete;
  TokenizerCore& operator=(const TokenizerCore&) = delete;

  [[nodiscard]] std::vector<Token> encode(std::string_view text, const EncodeOptions& options) const;
  /// The bytes of a token; none for an id that has no token. \throws Error invalid_argument.
  [[nodiscard]] std::string_view bytes(Token token, bool skip_special_tokens) const;

 private:
  struct Encoding;
  void add_text(std::string_view text, Encoding& to) const;
  void add_pieces(std::string_view text, Encoding& to) const;

  TokenizerData data_;
  AddedTokens raw_;
  AddedTokens normalized_;
  BytePairs pairs_;
  const Unicode& unicode_ = Unicode::tables();
};

/// The tokenizer in an engine directory with this manifest. \throws Error bad_engine: there is none, or it was changed.
std::shared_ptr<const TokenizerCore> load_tokenizer(const Manifest& manifest, const std::string& directory);

}  // namespace qwenport::detail
