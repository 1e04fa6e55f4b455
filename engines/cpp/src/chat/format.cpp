// The text of conversations: ChatTemplate and the public ChatFormat.
#include <algorithm>

#include "chat/template.hpp"
#include "manifest.hpp"
#include "tokenizer/unicode.hpp"

namespace qwenport {
namespace detail {
namespace {

constexpr std::string_view end_of_thinking = "</think>";

/// White space as Python's str.isspace has it.
bool is_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

std::string_view stripped(std::string_view text) {
  for (auto first = character_at(text, 0); first.size != 0 && is_space(first.c);
       first = character_at(text, 0)) {
    text.remove_prefix(first.size);
  }
  while (!text.empty()) {
    const Character last = character_before(text, text.size());
    if (!is_space(last.c)) break;
    text.remove_suffix(last.size);
  }
  return text;
}

std::string_view without_newlines_before(std::string_view text) {
  text.remove_prefix(std::min(text.find_first_not_of('\n'), text.size()));
  return text;
}

[[noreturn]] void invalid(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

bool lies(const std::string& text, Place place, std::string_view content) {
  if (place == Place::anywhere) return content.find(text) != std::string_view::npos;
  if (content.size() < text.size()) return false;
  const std::size_t at = place == Place::start ? 0 : content.size() - text.size();
  return content.substr(at, text.size()) == text;
}

const char* verb(Place place) {
  if (place == Place::anywhere) return "contains";
  return place == Place::start ? "starts with" : "ends with";
}

/// Refuse roles in another order than that of a conversation.
void check_roles(const std::vector<Message>& messages) {
  constexpr const char* accepted =
      "messages are an optional system message, then user and assistant in turn, the last a user's; ";
  std::size_t turn = 0;
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const std::string& role = messages[i].role;
    if (i == 0 && role == "system") continue;
    if (role != (turn++ % 2 == 0 ? "user" : "assistant")) {
      invalid(accepted + ("message " + std::to_string(i)) + " is of role \"" + role + "\"");
    }
  }
  if (turn % 2 == 0) invalid(std::string(accepted) + "these do not end with a user's");
}

}  // namespace

std::string_view ContentFormat::applied(std::string_view content) const {
  if (rule == Rule::verbatim) return content;
  if (rule == Rule::strip) return stripped(content);
  const std::size_t last = content.rfind(end_of_thinking);
  if (last == std::string_view::npos) return content;
  const std::string_view rest = content.substr(last + end_of_thinking.size());
  if (rule == Rule::after_thinking_lines) return without_newlines_before(rest);
  return rule == Rule::after_thinking_strip ? stripped(rest) : rest;
}

void ContentFormat::check(std::string_view content, const std::string& role) const {
  for (const Refused& one : refused) {
    if (!lies(one.text, one.place, content) && !lies(one.text, one.place, applied(content))) continue;
    invalid("the content of a message of role \"" + role + "\" " + verb(one.place) + " \"" + one.text +
            "\", which this model's chat template treats in a way of its own");
  }
}

std::string ChatTemplate::system_text(const std::string& content) const {
  if (!start_to_system) invalid("this model's chat template takes no system message");
  system.check(content, "system");
  return *start_to_system + std::string(system.applied(content)) + system_to_user;
}

std::string ChatTemplate::text(const std::vector<Message>& messages) const {
  check_roles(messages);
  std::string all;
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const auto& [role, content] = messages[i];
    if (role == "system") {
      all += system_text(content);
    } else if (role == "user") {
      user.check(content, role);
      if (i == 0) all += start_to_user;
      all.append(user.applied(content)).append(i + 1 == messages.size() ? user_to_reply : user_to_assistant);
    } else {
      assistant.check(content, role);
      all.append(assistant.applied(content)).append(assistant_to_user);
    }
  }
  return all;
}

}  // namespace detail

ChatFormat::ChatFormat(std::shared_ptr<const detail::ChatTemplate> format) : format_(std::move(format)) {}

ChatFormat ChatFormat::load(const std::string& engine_directory) {
  const detail::Manifest manifest = detail::read_manifest(engine_directory);
  return ChatFormat(
      std::make_shared<const detail::ChatTemplate>(detail::chat_template(manifest, engine_directory)));
}

std::string ChatFormat::text(const std::vector<Message>& messages) const {
  std::vector<Message> valid;
  valid.reserve(messages.size());
  for (const Message& message : messages) {
    valid.push_back({message.role, detail::valid_utf8(message.content)});
  }
  return format_->text(valid);
}

}  // namespace qwenport
