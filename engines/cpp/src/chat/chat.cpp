// Conversations: ChatCore and the public Chat.
#include <algorithm>
#include <utility>

#include "backend.hpp"
#include "chat/core.hpp"
#include "generation.hpp"
#include "tokenizer/core.hpp"
#include "tokenizer/unicode.hpp"

namespace qwenport {
namespace detail {
namespace {

std::vector<std::vector<Token>> bytes_of(const std::vector<std::string>& texts) {
  std::vector<std::vector<Token>> all;
  all.reserve(texts.size());
  for (std::size_t i = 0; i < texts.size(); ++i) {
    if (texts[i].empty()) {
      throw Error(ErrorCode::invalid_argument, "stop string " + std::to_string(i) + " is empty");
    }
    if (!is_valid_utf8(texts[i])) {
      throw Error(ErrorCode::invalid_argument, "stop string " + std::to_string(i) + " is not UTF-8");
    }
    all.emplace_back();
    for (const char byte : texts[i]) all.back().push_back(static_cast<unsigned char>(byte));
  }
  return all;
}

}  // namespace

/// While one lives, the chat is its reply's.
class ChatCore::Replying {
 public:
  explicit Replying(ChatCore& chat) : chat_(chat) {
    chat_.misused_ = chat_.replying_;
    chat_.check_callback();
    chat_.replying_ = true;
  }
  ~Replying() { chat_.replying_ = false; }
  Replying(const Replying&) = delete;
  Replying& operator=(const Replying&) = delete;

 private:
  ChatCore& chat_;
};

ChatCore::ChatCore(std::shared_ptr<SessionCore> session, Tokenizer tokenizer, ChatTemplate format,
                   const std::vector<Token>& stop_tokens, const ChatOptions& options)
    : session_(std::move(session)),
      tokenizer_(std::move(tokenizer)),
      format_(std::move(format)),
      options_(options.generate),
      stops_(bytes_of(options.stop_strings)),
      drop_oldest_(options.drop_oldest) {
  options_.append = true;
  options_.logprobs = -1;
  options_.stop_tokens.insert(options_.stop_tokens.end(), stop_tokens.begin(), stop_tokens.end());
  if (options.system) {
    system_ = valid_utf8(*options.system);
    static_cast<void>(format_.system_text(*system_));  // it is refused here, not by each turn
  }
  reset();
}

void ChatCore::reset() {
  const Replying replying(*this);
  session_->reset();
  history_.clear();
  sends_ = 0;
}

/// After a callback. \throws Error invalid_argument if it called the chat, even if it ignores that.
void ChatCore::check_callback() const {
  if (misused_) throw Error(ErrorCode::invalid_argument, "a callback must not use its chat");
}

/// The tokens of the conversation without its oldest turns, and with a user's next message.
std::vector<Token> ChatCore::encode(std::size_t dropped, const std::string& content) const {
  std::vector<Message> messages;
  if (system_) messages.push_back({"system", *system_});
  messages.insert(messages.end(), history_.begin() + static_cast<std::ptrdiff_t>(2 * dropped),
                  history_.end());
  messages.push_back({"user", content});
  return tokenizer_.encode(format_.text(messages), {/*add_special_tokens=*/false});
}

/// The next prompt; see ChatOptions::drop_oldest.
ChatCore::Prompt ChatCore::make_prompt(const std::string& content) const {
  const auto capacity = static_cast<std::size_t>(session_->capacity());
  const auto wanted =
      static_cast<std::size_t>(std::clamp(options_.max_new_tokens, 0, session_->capacity() / 2));
  const std::size_t turns = history_.size() / 2;
  Prompt prompt{encode(0, content), 0};
  while (drop_oldest_ && prompt.dropped < turns && prompt.tokens.size() + wanted > capacity + 1) {
    prompt.tokens = encode(++prompt.dropped, content);
  }
  if (prompt.tokens.size() > capacity) {
    throw Error(ErrorCode::capacity,
                "the conversation has " + std::to_string(prompt.tokens.size()) +
                    " tokens, the cache room for " + std::to_string(capacity) + ": " +
                    (prompt.dropped < turns ? "reset the chat, or let it drop its oldest turns"
                                            : "the message is too long"));
  }
  return prompt;
}

/// Keep of the cache what the prompt begins with, unless the model scales keys by a length that is another one now; the
/// prompt's last token is always fed. Returns how many tokens that are.
std::size_t ChatCore::keep_common(const std::vector<Token>& prompt) {
  const std::vector<Token>& held = session_->held(0);
  const std::size_t most =
      std::min(session_->reusable(0, prompt.size()), std::max<std::size_t>(prompt.size(), 1) - 1);
  const auto end = held.begin() + static_cast<std::ptrdiff_t>(most);
  const auto common = std::mismatch(held.begin(), end, prompt.begin()).first - held.begin();
  session_->truncate(static_cast<int>(common), 0);
  return static_cast<std::size_t>(common);
}

Reply ChatCore::generate(TokenView prompt, const OnText& on_text) {
  ReplyText said(tokenizer_, stops_);
  const auto deliver = [&](std::string_view piece) {
    if (!piece.empty() && on_text) on_text(piece);
    check_callback();
  };
  GenerateOptions options = options_;
  options.seed += sends_;
  const auto results = detail::generate(*session_, {prompt}, options, [&](int /*row*/, Token token) {
    deliver(said.push(token));
    return said.stop() >= 0;
  });
  deliver(said.finish());
  Reply reply;
  reply.text = said.text();
  reply.reason = said.stop() >= 0 ? FinishReason::stop : results.front().reason;
  reply.stop_string = said.stop();
  reply.prompt_tokens = static_cast<int>(prompt.size);
  reply.new_tokens = static_cast<int>(results.front().tokens.size());
  return reply;
}

Reply ChatCore::send(std::string_view given, const OnText& on_text) {
  const Replying replying(*this);
  Message message{"user", valid_utf8(std::string(given))};
  const auto [prompt, dropped] = make_prompt(message.content);
  const std::size_t kept = keep_common(prompt);
  try {
    history_.reserve(history_.size() + 2);
    Reply reply = generate({prompt.data() + kept, prompt.size() - kept}, on_text);
    reply.dropped = static_cast<int>(dropped);
    Message answer{"assistant", reply.text};
    // nothing below throws
    history_.erase(history_.begin(), history_.begin() + static_cast<std::ptrdiff_t>(2 * dropped));
    history_.push_back(std::move(message));
    history_.push_back(std::move(answer));
    ++sends_;
    return reply;
  } catch (...) {
    session_->truncate(static_cast<int>(kept), 0);
    throw;
  }
}

}  // namespace detail

namespace {

detail::ChatCore& core_of(const std::shared_ptr<detail::ChatCore>& core) {
  if (core == nullptr)
    throw Error(ErrorCode::invalid_argument, "this chat was moved to another one; use that");
  return *core;
}

}  // namespace

Chat::Chat(const Engine& engine, const ChatOptions& options) {
  const detail::Manifest& manifest = engine.model_->manifest();
  const detail::ChatTemplate format = detail::chat_template(manifest, engine.directory_);
  if (options.session.max_batch != 1) {
    throw Error(ErrorCode::invalid_argument,
                "a chat is a session of 1 row, got " + std::to_string(options.session.max_batch));
  }
  core_ = std::make_shared<detail::ChatCore>(Session(engine, options.session).core_,
                                             Tokenizer(detail::load_tokenizer(manifest, engine.directory_)),
                                             format, manifest.stop_tokens, options);
}
Chat::Chat(Chat&&) noexcept = default;
Chat& Chat::operator=(Chat&&) noexcept = default;
Chat::~Chat() = default;

Reply Chat::send(std::string_view content, const OnText& on_text) {
  const auto core = core_;  // a callback may destroy this chat
  return core_of(core).send(content, on_text);
}

const std::vector<Message>& Chat::history() const { return core_of(core_).history(); }

void Chat::reset() { core_of(core_).reset(); }

}  // namespace qwenport
