// An engine of the toy network with a tokenizer of a few tokens, in a directory of its own.
#pragma once

#include <string>
#include <string_view>

namespace stand_in {

constexpr int small_vocab = 259;

/// Tokens 0 to 255 are bytes, 256 "ab", 257 "abc", 258 "<|x|>", which is special. GPT-2's pre-tokenizer, and NFC. 258 is put
/// before a text.
std::string small_tokenizer();

/// `chat` of a manifest's text. System, user and assistant begin with <|x|> and a letter; what users say is stripped and must
/// not start with "<tool>", what assistants say is taken from behind </think> on.
std::string_view small_chat();

/// A temporary engine directory, of capacity 64.
class Directory {
 public:
  /// \param tokenizer what the tokenizer file holds; "" for none. \param chat JSON; "null" for none.
  /// \param unscaled_length longer requests scale keys; 0: none do.
  explicit Directory(const std::string& tokenizer, std::string_view chat = "null", int unscaled_length = 0);
  ~Directory();
  Directory(const Directory&) = delete;
  Directory& operator=(const Directory&) = delete;
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace stand_in
