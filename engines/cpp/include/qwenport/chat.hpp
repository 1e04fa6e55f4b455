// A conversation with a chat model, in text, with the chat template and the stop tokens of its engine directory.
//
//     const auto engine = qwenport::Engine::load("engine");
//     qwenport::Chat chat(engine);
//     chat.send("Why is the sky blue?", [](std::string_view piece) { std::cout << piece << std::flush; });
//     chat.send("And at night?", [](std::string_view piece) { std::cout << piece << std::flush; });
//
// A turn computes what is new: the rest of the conversation stays in the session's cache. `qwenport build` derives the
// format of a conversation from the checkpoint's chat template; docs/chat.md says of which.
//
// Threads. A ChatFormat never changes: copy it and use it from any number of threads. A Chat belongs to one thread at a
// time, as its session does.
#ifndef QWENPORT_CHAT_HPP
#define QWENPORT_CHAT_HPP

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <qwenport/tokenizer.hpp>

namespace qwenport {

namespace detail {
class ChatCore;
struct ChatTemplate;
}  // namespace detail

/// UTF-8; what is invalid in it is replaced by U+FFFD.
struct Message {
  std::string role;  ///< "system", "user" or "assistant"
  std::string content;
};

/// How the model's chat template writes conversations.
class QWENPORT_EXPORT ChatFormat {
 public:
  /// Load the chat format of an engine directory. Nothing else of the engine is loaded.
  /// \throws Error bad_engine: the directory is no engine, or has no chat format; the message says why.
  static ChatFormat load(const std::string& engine_directory);

  /// The text of a conversation that the model is to reply to: that of transformers' apply_chat_template with
  /// add_generation_prompt. Its tokens are Tokenizer::encode of it without add_special_tokens.
  /// \param messages an optional system message, then user and assistant in turn; the last is a user's.
  /// \throws Error invalid_argument: they are not, the template takes no system message, or it does with a content what
  ///   this library does not know, such as wrapping a tool's answer.
  [[nodiscard]] std::string text(const std::vector<Message>& messages) const;

 private:
  explicit ChatFormat(std::shared_ptr<const detail::ChatTemplate> format);
  std::shared_ptr<const detail::ChatTemplate> format_;
};

struct ChatOptions {
  std::optional<std::string> system;  ///< the system message; none: what the template says without one
  /// How replies are generated. stop_tokens are added to the model's own. The n-th reply draws with seed + n. append and
  /// logprobs have no effect. What cancellation points to must outlive the chat.
  GenerateOptions generate;
  /// None empty. A reply ends before the first of these texts: of several that end together, before the longest. Text that
  /// may be the beginning of one is held back until that is decided. The text of stop tokens is not searched.
  std::vector<std::string> stop_strings;
  /// Where a turn would leave room for fewer than min(max_new_tokens, capacity / 2) new tokens, let the oldest turns leave
  /// the conversation; the system message stays. What is left is computed anew.
  bool drop_oldest = false;
  SessionOptions session;  ///< of one row
};

/// What the model said.
struct Reply {
  std::string text;  ///< without the stop string
  FinishReason reason = FinishReason::length;
  int stop_string = -1;   ///< the index of the stop string that ended it, or -1
  int prompt_tokens = 0;  ///< those of the conversation that this turn fed; the cache had the others
  int new_tokens = 0;     ///< that were drawn, the stop token not counted
  int dropped = 0;        ///< turns that left the conversation
};

/// Called with the reply's text, piece by piece, none empty, each valid UTF-8. An exception from it ends the reply.
using OnText = std::function<void(std::string_view piece)>;

/// A conversation, and the session that computes it.
class QWENPORT_EXPORT Chat {
 public:
  /// \throws Error bad_engine (no tokenizer or no chat format; the message says why), invalid_argument (more than one row, an
  ///   empty stop string, a system message that the template does not take), and what Session's constructor throws.
  explicit Chat(const Engine& engine, const ChatOptions& options = {});
  Chat(Chat&&) noexcept;
  Chat& operator=(Chat&&) noexcept;
  Chat(const Chat&) = delete;
  Chat& operator=(const Chat&) = delete;
  ~Chat();

  /// The user's turn, and the model's reply to it. A reply that was cancelled or cut is part of the conversation as far as
  /// it goes. After an exception, be it from on_text, the chat is as before the call; after Error device it can only be
  /// destroyed.
  /// \throws Error capacity (no room for the conversation; with drop_oldest: for this turn alone), invalid_argument (a
  ///   content that ChatFormat refuses, options that generate refuses, or a call from a callback of this chat), sampling,
  ///   device.
  Reply send(std::string_view content, const OnText& on_text = nullptr);

  /// What the user and the model have said: the conversation so far, without the system message.
  [[nodiscard]] const std::vector<Message>& history() const;

  /// Begin anew: the chat is as after construction. \throws Error invalid_argument: a callback of this chat called it.
  void reset();

 private:
  std::shared_ptr<detail::ChatCore> core_;
};

}  // namespace qwenport

#endif
