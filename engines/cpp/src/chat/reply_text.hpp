// The text of a reply while its tokens are drawn.
#pragma once

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
      : decoder_(tokenizer), matching_(stops) {}

  /// Append a token, unless the text has ended. Returns the text that is now certain.
  std::string_view push(Token token) {
    search(decoder_.push(token));
    return release(stop_ >= 0 ? matching_.size(stop_) : matching_.undecided());
  }

  /// End the text. Returns what was held back, and U+FFFD for a character that is incomplete; nothing if it has ended with a
  /// stop string.
  std::string_view finish() {
    if (stop_ >= 0) return {};
    search(decoder_.flush());
    return release(matching_.size(stop_));
  }

  /// The index of the stop string that has ended the text, or -1.
  [[nodiscard]] int stop() const noexcept { return stop_; }
  /// The text that push and finish have returned.
  [[nodiscard]] std::string text() const { return all_.substr(0, certain_); }

 private:
  /// Append text up to a stop string.
  void search(const std::string& text) {
    for (const char byte : text) {
      all_ += byte;
      stop_ = matching_.push(static_cast<unsigned char>(byte));
      if (stop_ >= 0) break;
    }
  }

  /// The text that has not been returned, without the last bytes.
  std::string_view release(std::size_t held_back) {
    const std::size_t end = all_.size() - held_back;
    const std::string_view found = std::string_view(all_).substr(certain_, end - certain_);
    certain_ = end;
    return found;
  }

  StreamDecoder decoder_;
  StopSequences matching_;
  std::string all_;          // also what is held back, or of a stop string
  std::size_t certain_ = 0;  // bytes of it
  int stop_ = -1;
};

}  // namespace qwenport::detail
