// The text of a reply while its tokens are drawn.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "qwenport/tokenizer.hpp"
#include "stop_sequences.hpp"

namespace qwenport::detail {

/// Decodes tokens up to a stop string. Text that may be the beginning of one is held back.
class ReplyText {
 public:
  /// \param stops the bytes of stop strings, each of valid UTF-8; must outlive this.
  ReplyText(const Tokenizer& tokenizer, const std::vector<std::vector<Token>>& stops)
      : tokenizer_(tokenizer), decoder_(tokenizer), matching_(stops) {}

  /// Append a token, unless the text has ended. Returns the text that is now certain.
  std::string_view push(Token token) {
    tokens_.push_back(token);
    const std::string piece = decoder_.push(token);
    decoded_ += piece.size();
    ends_.push_back(decoded_);
    return search(piece, /*last=*/false);
  }

  /// End the text. Returns what was held back, unless it ends with a stop string.
  std::string_view finish() {
    if (stop_ >= 0) return {};
    return search(decoder_.flush(), /*last=*/true);
  }

  /// The index of the stop string that has ended the text, or -1.
  [[nodiscard]] int stop() const noexcept { return stop_; }
  /// The text that push and finish have returned.
  [[nodiscard]] std::string text() const { return all_.substr(0, certain_); }
  [[nodiscard]] std::size_t size() const noexcept { return tokens_.size(); }

  /// The most tokens whose text this is exactly; none if it ends inside a token.
  [[nodiscard]] std::optional<std::vector<Token>> exact_tokens() const {
    if (stop_ < 0) return tokens_;
    for (std::size_t count = tokens_.size();; --count) {
      const std::size_t end = count == 0 ? 0 : ends_[count - 1];
      if (end < certain_) return std::nullopt;
      std::vector<Token> first(tokens_.begin(), tokens_.begin() + static_cast<std::ptrdiff_t>(count));
      if (end == certain_ && tokenizer_.decode(first) == text()) return first;
      if (count == 0) return std::nullopt;
    }
  }

 private:
  std::string_view search(const std::string& piece, bool last) {
    for (const char byte : piece) {
      all_ += byte;
      stop_ = matching_.push(static_cast<unsigned char>(byte));
      if (stop_ < 0) continue;
      return release(all_.size() - matching_.size(stop_));
    }
    return release(last ? all_.size() : all_.size() - matching_.undecided());
  }

  std::string_view release(std::size_t end) {
    const std::string_view found = std::string_view(all_).substr(certain_, end - certain_);
    certain_ = end;
    return found;
  }

  const Tokenizer& tokenizer_;
  StreamDecoder decoder_;
  StopSequences matching_;
  std::vector<Token> tokens_;
  std::vector<std::size_t> ends_;  // bytes that the decoder had made after each token
  std::size_t decoded_ = 0;
  std::string all_;          // also what is held back, or of a stop string
  std::size_t certain_ = 0;  // bytes of it
  int stop_ = -1;
};

}  // namespace qwenport::detail
