// A conversation and its session: what Chat is a handle of.
//
// Each prompt is the whole conversation as the chat template writes it, in the tokens that transformers gives it. As many of
// them as the session holds already, from the first on, are not fed again: normally all to the end of the reply, and none if
// the model scales keys by the conversation's length.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "chat/reply_text.hpp"
#include "chat/template.hpp"
#include "session.hpp"

namespace qwenport::detail {

class ChatCore {
 public:
  /// \param stop_tokens the model's.
  ChatCore(std::shared_ptr<SessionCore> session, Tokenizer tokenizer, ChatTemplate format,
           const std::vector<Token>& stop_tokens, const ChatOptions& options);

  Reply send(std::string_view given, const OnText& on_text);
  void reset();
  [[nodiscard]] const std::vector<Message>& history() const noexcept { return history_; }

 private:
  class Replying;
  struct Prompt {
    std::vector<Token> tokens;
    std::size_t dropped = 0;  // turns
  };

  [[nodiscard]] Prompt make_prompt(const std::string& content) const;
  [[nodiscard]] std::vector<Token> encode(std::size_t dropped, const std::string& content) const;
  std::size_t keep_common(const std::vector<Token>& prompt);
  Reply generate(TokenView prompt, const OnText& on_text);
  void check_callback() const;

  std::shared_ptr<SessionCore> session_;
  Tokenizer tokenizer_;
  ChatTemplate format_;
  GenerateOptions options_;
  std::optional<std::string> system_;
  std::vector<std::vector<Token>> stops_;  // bytes
  bool drop_oldest_;
  std::vector<Message> history_;
  std::uint64_t sends_ = 0;
  bool replying_ = false;
  bool misused_ = false;  // by a callback of that reply
};

}  // namespace qwenport::detail
