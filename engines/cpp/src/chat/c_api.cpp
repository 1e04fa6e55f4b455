// The C API of chat formats and chats.
#include "qwenport/chat.h"

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "c_guard.hpp"
#include "c_types.hpp"
#include "qwenport/chat.hpp"

struct qwenport_chat_format {
  qwenport::ChatFormat format;
};

struct qwenport_chat {
  qwenport::Chat chat;
  std::unique_ptr<void*> user;  // of the send of now
  std::string reply;            // the last one's text
  std::vector<qwenport_message> history;
};

namespace {

using qwenport::detail::copied;
using qwenport::detail::guarded;
using qwenport::detail::need;

std::string_view text_of(const char* text, size_t bytes, const std::string& name) {
  if (bytes == 0) return {};
  need({{name, text}});
  return {text, bytes};
}

qwenport::ChatOptions options_of(const qwenport_chat_options& given, void* const* user) {
  qwenport::ChatOptions options;
  if (given.system != nullptr) options.system = given.system;
  options.generate = qwenport::detail::options_of(given.generate, user);
  if (given.stop_string_count != 0) need({{"options.stop_strings", given.stop_strings}});
  for (size_t i = 0; i < given.stop_string_count; ++i) {
    need({{"options.stop_strings[" + std::to_string(i) + "]", given.stop_strings[i]}});
    options.stop_strings.emplace_back(given.stop_strings[i]);
  }
  options.drop_oldest = given.drop_oldest != 0;
  options.session = {given.session.max_batch, given.session.capacity, given.session.cuda_graphs != 0};
  return options;
}

}  // namespace

extern "C" {

int qwenport_chat_format_load(const char* directory, qwenport_chat_format** format) {
  return guarded([&] {
    need({{"directory", directory}, {"format", format}});
    *format = new qwenport_chat_format{qwenport::ChatFormat::load(directory)};
  });
}

void qwenport_chat_format_free(qwenport_chat_format* format) { delete format; }

int qwenport_chat_format_text(const qwenport_chat_format* format, const qwenport_message* messages,
                              size_t count, char** text, size_t* bytes) {
  return guarded([&] {
    need({{"format", format}, {"text", text}, {"bytes", bytes}});
    if (count != 0) need({{"messages", messages}});
    std::vector<qwenport::Message> given;
    for (size_t i = 0; i < count; ++i) {
      const std::string name = "messages[" + std::to_string(i) + "].";
      need({{name + "role", messages[i].role}});
      given.push_back(
          {messages[i].role, std::string(text_of(messages[i].content, messages[i].bytes, name + "content"))});
    }
    const std::string made = format->format.text(given);
    *text = copied(made.data(), made.size());
    *bytes = made.size();
  });
}

qwenport_chat_options qwenport_chat_defaults(void) {
  const qwenport::ChatOptions options;
  return {nullptr, qwenport_generate_defaults(), nullptr,
          0,       options.drop_oldest ? 1 : 0,  qwenport_session_defaults()};
}

int qwenport_chat_create(const qwenport_engine* engine, const qwenport_chat_options* options,
                         qwenport_chat** chat) {
  return guarded([&] {
    need({{"engine", engine}, {"chat", chat}});
    auto user = std::make_unique<void*>(nullptr);
    qwenport::Chat made(engine->engine,
                        options_of(options != nullptr ? *options : qwenport_chat_defaults(), user.get()));
    *chat = new qwenport_chat{std::move(made), std::move(user), "", {}};
  });
}

void qwenport_chat_free(qwenport_chat* chat) { delete chat; }

int qwenport_chat_send(qwenport_chat* chat, const char* content, size_t bytes, qwenport_on_text on_text,
                       void* user, qwenport_reply* reply) {
  return guarded([&] {
    need({{"chat", chat}});
    const std::string_view message = text_of(content, bytes, "content");
    qwenport::OnText forward;
    if (on_text != nullptr) {
      forward = [=](std::string_view piece) { on_text(user, piece.data(), piece.size()); };
    }
    *chat->user = user;
    const qwenport::Reply said = chat->chat.send(message, forward);
    chat->reply = said.text;
    if (reply != nullptr) {
      *reply = {chat->reply.c_str(), chat->reply.size(), static_cast<int>(said.reason),
                said.stop_string,    said.prompt_tokens, said.new_tokens,
                said.dropped};
    }
  });
}

int qwenport_chat_history(qwenport_chat* chat, const qwenport_message** messages, size_t* count) {
  return guarded([&] {
    need({{"chat", chat}, {"messages", messages}, {"count", count}});
    chat->history.clear();
    for (const qwenport::Message& message : chat->chat.history()) {
      chat->history.push_back({message.role.c_str(), message.content.data(), message.content.size()});
    }
    *messages = chat->history.data();
    *count = chat->history.size();
  });
}

int qwenport_chat_reset(qwenport_chat* chat) {
  return guarded([&] {
    need({{"chat", chat}});
    chat->chat.reset();
  });
}

}  // extern "C"
