// Replies that a test dictates, and what the model saw before it drew them.
#pragma once

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "qwenport/chat.hpp"
#include "small_engine.hpp"

namespace stand_in {

constexpr qwenport::Token small_stop = 258;

/// Makes the model say `next`, then the stop token.
class Script {
 public:
  std::vector<qwenport::Token> next;
  std::vector<float> first_logits;  ///< of the last reply, before they were edited

  [[nodiscard]] qwenport::OnLogits hook() {
    return [this](int /*row*/, qwenport::EditableLogits logits, const std::vector<qwenport::Token>& drawn) {
      if (drawn.empty()) first_logits.assign(logits.begin(), logits.end());
      const qwenport::Token token = drawn.size() < next.size() ? next[drawn.size()] : small_stop;
      for (float& one : logits) one = -std::numeric_limits<float>::infinity();
      logits[static_cast<std::size_t>(token)] = 0;
    };
  }
  /// Whether the last reply followed this prompt.
  [[nodiscard]] bool followed(const qwenport::Engine& engine,
                              const std::vector<qwenport::Token>& prompt) const {
    qwenport::Session session(engine);
    const float* const logits = session.prefill(prompt).row(0);
    return std::vector<float>(logits, logits + small_vocab) == first_logits;
  }
};

/// An engine with a chat format, its tokenizer, and a script for chats with it.
struct Stage {
  /// \param unscaled_length longer requests scale keys; 0: none do.
  explicit Stage(int unscaled_length = 0) : directory(small_tokenizer(), small_chat(), unscaled_length) {}
  Directory directory;
  qwenport::Engine engine = qwenport::Engine::load(directory.path());
  qwenport::Tokenizer tokenizer = qwenport::Tokenizer::load(directory.path());
  qwenport::ChatFormat format = qwenport::ChatFormat::load(directory.path());
  Script script;

  /// Options of a chat that follows the script.
  [[nodiscard]] qwenport::ChatOptions scripted() {
    qwenport::ChatOptions options;
    options.generate.on_logits = script.hook();
    return options;
  }
  [[nodiscard]] std::vector<qwenport::Token> encode(const std::string& text) const {
    return tokenizer.encode(text, {/*add_special_tokens=*/false});
  }
};

/// "role: content" of each message.
inline std::vector<std::string> lines(const std::vector<qwenport::Message>& messages) {
  std::vector<std::string> all;
  all.reserve(messages.size());
  for (const auto& [role, content] : messages) all.emplace_back(role).append(": ").append(content);
  return all;
}

}  // namespace stand_in
