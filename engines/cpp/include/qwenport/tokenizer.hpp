// Text to token ids and back, with the tokenizer of an engine directory. The ids are those of Hugging Face's `tokenizers`.
//
//     const auto engine = qwenport::Engine::load("engine");
//     const auto tokenizer = qwenport::Tokenizer::load("engine");
//     qwenport::Session session(engine);
//     qwenport::StreamDecoder text(tokenizer);
//     session.generate(tokenizer.encode("Once upon a time"), {}, [&](int, qwenport::Token token) {
//       std::cout << text.push(token) << std::flush;
//     });
//     std::cout << text.flush() << '\n';
//
// `qwenport build` writes tokenizer.qwenport into an engine whose tokenizer.json it understands; docs/tokenizer.md says which
// that are.
//
// Threads. A Tokenizer never changes: copy it and use it from any number of threads. A StreamDecoder belongs to one text.
#ifndef QWENPORT_TOKENIZER_HPP
#define QWENPORT_TOKENIZER_HPP

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <qwenport/qwenport.hpp>

namespace qwenport {

namespace detail {
class TokenizerCore;
}

struct EncodeOptions {
  bool add_special_tokens = true;  ///< put around the text what the tokenizer does: BOS, with Llama
  bool split_special_tokens =
      false;  ///< special tokens in the text, such as <|im_end|>, are text: for input that may not have any
};

class QWENPORT_EXPORT Tokenizer {
 public:
  /// Load the tokenizer of an engine directory: milliseconds. Nothing else of the engine is loaded.
  /// \throws Error bad_engine: the directory is no engine, has no tokenizer that this library reads, or was changed.
  static Tokenizer load(const std::string& engine_directory);

  /// The tokens of a text.
  /// \param text UTF-8; what is invalid in it is replaced by U+FFFD, as in Python's errors="replace".
  /// \throws Error invalid_argument: more than 256 MB.
  [[nodiscard]] std::vector<Token> encode(std::string_view text, const EncodeOptions& options = {}) const;

  /// The text of tokens, UTF-8: their bytes, of which what is invalid is replaced by U+FFFD. An id without a token, of which
  /// an embedding may have some, has no text.
  /// \param skip_special_tokens leave special tokens out.
  /// \throws Error invalid_argument: a negative id.
  [[nodiscard]] std::string decode(const std::vector<Token>& tokens, bool skip_special_tokens = true) const;

 private:
  friend class StreamDecoder;
  friend class Chat;
  explicit Tokenizer(std::shared_ptr<const detail::TokenizerCore> core);
  std::shared_ptr<const detail::TokenizerCore> core_;
};

/// The text of a growing sequence of tokens, piece by piece. All pieces together are `decode` of all tokens; each is valid
/// UTF-8 by itself: a character split over tokens comes with its last.
class QWENPORT_EXPORT StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer, bool skip_special_tokens = true);

  /// Append a token; the text that is now certain, often none. \throws Error invalid_argument: a negative id.
  std::string push(Token token);
  /// End the text: U+FFFD for a character that is incomplete, else nothing. Then start anew.
  std::string flush();

 private:
  std::shared_ptr<const detail::TokenizerCore> core_;
  bool skip_special_tokens_;
  std::string pending_;  // the beginning of a character
};

}  // namespace qwenport

#endif
