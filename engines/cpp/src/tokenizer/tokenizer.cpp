// The public Tokenizer and StreamDecoder.
#include "qwenport/tokenizer.hpp"

#include <array>

#include "contract.hpp"
#include "files.hpp"
#include "tokenizer/core.hpp"

namespace qwenport {
namespace detail {

namespace {
constexpr std::size_t most_text_bytes = std::size_t{1} << 28U;
}

struct TokenizerCore::Encoding {
  bool split_special = false;
  std::vector<Token>& tokens;
  BytePairs::Scratch scratch;
};

std::vector<Token> TokenizerCore::encode(std::string_view text, const EncodeOptions& options) const {
  if (text.size() > most_text_bytes) {
    throw Error(ErrorCode::invalid_argument, "a text of " + std::to_string(text.size()) +
                                                 " bytes; the most is " + std::to_string(most_text_bytes));
  }
  std::string replaced;
  if (!is_valid_utf8(text)) {
    append_valid(text, /*whole=*/true, replaced);
    text = replaced;
  }
  std::vector<Token> tokens;
  tokens.reserve(text.size() / 4);
  if (options.add_special_tokens) tokens.assign(data_.before.begin(), data_.before.end());
  Encoding to{options.split_special_tokens, tokens, {}};
  for (const auto& part : raw_.parts(text, to.split_special, unicode_)) {
    if (part.token != nullptr) {
      tokens.push_back(part.token->id);
    } else {
      add_text(text.substr(part.start, part.end - part.start), to);
    }
  }
  if (options.add_special_tokens) tokens.insert(tokens.end(), data_.after.begin(), data_.after.end());
  return tokens;
}

/// Text between those added tokens that are looked for before it is normalized.
void TokenizerCore::add_text(std::string_view text, Encoding& to) const {
  std::string normalized;
  if (data_.nfc && !unicode_.is_plain(text)) {
    normalized = unicode_.nfc(text);
    text = normalized;
  }
  for (const auto& part : normalized_.parts(text, to.split_special, unicode_)) {
    if (part.token != nullptr) {
      to.tokens.push_back(part.token->id);
    } else {
      add_pieces(text.substr(part.start, part.end - part.start), to);
    }
  }
}

/// Text without added tokens. Each pre-tokenizer splits the pieces of the one before it; none looks back.
void TokenizerCore::add_pieces(std::string_view text, Encoding& to) const {
  const std::size_t last = data_.splits.size();
  std::array<std::size_t, most_splits + 1> ends{text.size()};  // of the pieces that each made here
  std::size_t level = 0;
  for (std::size_t at = 0; at < text.size();) {
    for (; level < last; ++level) {
      const std::string_view rest = text.substr(at, ends[level] - at);
      ends[level + 1] = at + piece_end(data_.splits[level], rest, unicode_);
    }
    pairs_.encode(text.substr(at, ends[last] - at), to.scratch, to.tokens);
    at = ends[last];
    while (level > 0 && ends[level] == at) --level;
  }
}

std::string_view TokenizerCore::bytes(Token token, bool skip_special_tokens) const {
  if (token < 0) throw Error(ErrorCode::invalid_argument, "token " + std::to_string(token) + " is negative");
  const auto id = static_cast<std::size_t>(token);
  if (id >= data_.size() || (skip_special_tokens && (data_.flags[id] & skipped) != 0)) return {};
  return data_.bytes(id);
}

std::shared_ptr<const TokenizerCore> load_tokenizer(const Manifest& manifest, const std::string& directory) {
  if (!manifest.tokenizer) {
    throw Error(ErrorCode::bad_engine, directory + ": no " + contract::tokenizer_name +
                                           "; `qwenport build` says why it leaves one out");
  }
  const std::string path = directory + "/" + contract::tokenizer_name;
  const MappedFile mapped(path);
  check_file(*manifest.tokenizer, directory, mapped);
  return std::make_shared<const TokenizerCore>(
      std::string_view(static_cast<const char*>(mapped.data()), mapped.size()), path);
}

}  // namespace detail

Tokenizer::Tokenizer(std::shared_ptr<const detail::TokenizerCore> core) : core_(std::move(core)) {}

Tokenizer Tokenizer::load(const std::string& engine_directory) {
  return Tokenizer(detail::load_tokenizer(detail::read_manifest(engine_directory), engine_directory));
}

std::vector<Token> Tokenizer::encode(std::string_view text, const EncodeOptions& options) const {
  return core_->encode(text, options);
}

std::string Tokenizer::decode(const std::vector<Token>& tokens, bool skip_special_tokens) const {
  std::string bytes;
  for (const Token token : tokens) bytes += core_->bytes(token, skip_special_tokens);
  return detail::valid_utf8(std::move(bytes));
}

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, bool skip_special_tokens)
    : core_(tokenizer.core_), skip_special_tokens_(skip_special_tokens) {}

std::string StreamDecoder::push(Token token) {
  pending_ += core_->bytes(token, skip_special_tokens_);
  std::string text;
  pending_.erase(0, detail::append_valid(pending_, /*whole=*/false, text));
  return text;
}

std::string StreamDecoder::flush() {
  std::string text;
  detail::append_valid(pending_, /*whole=*/true, text);
  pending_.clear();
  return text;
}

}  // namespace qwenport
